"""The connection type of a GPU host: a form with the fields that it needs, and a Test button.

The button runs the same first contact as ``check_cluster``. Airflow finds connection types only in
installed distributions; ``fast_cpt.dist-info`` makes this folder one if it is on PYTHONPATH.
"""

from __future__ import annotations

from typing import Any

from airflow.sdk import BaseHook


class GpuHostHook(BaseHook):
    """For Airflow's Test button only; tasks use ``fastcpt.cluster``."""

    conn_name_attr = "gpu_host_conn_id"
    default_conn_name = "gpu_host_default"
    conn_type = "gpuhost"  # a URI scheme: no underscore
    hook_name = "GPU host"

    def __init__(self, gpu_host_conn_id: str = default_conn_name) -> None:
        super().__init__()
        self.connection = gpu_host_conn_id

    def test_connection(self) -> tuple[bool, str]:
        """Whether the host is usable, and what it has, or what to do."""
        from fastcpt.cluster.check import check_host
        from fastcpt.cluster.remote import ClusterError, ConnectionLost
        from fastcpt.recipe_sections import Cluster
        from remote_job import connection_of, remote_of

        try:
            extra = connection_of(self.connection).extra_dejson
            root = extra.get("root") or Cluster.model_fields["root"].default
            facts = check_host(remote_of(self.connection), root)
        except (ClusterError, ConnectionLost) as error:
            return False, str(error)
        names = [gpu["name"] for gpu in facts["gpus"]]
        gpus = f"{len(names)} x {names[0]}" if names else "no GPU that nvidia-smi shows"
        return True, (
            f"{facts['hostname']}: {gpus}, {facts['cores']} cores, {facts['memory_gb']:.0f} GB memory, "
            f"Python {facts['python']}, {facts['disk_free_gb']:.0f} GB free under {facts['root']}"
        )


def _field(label: str, description: str) -> dict[str, Any]:
    return {
        "label": label,
        "description": description,
        "schema": {"type": ["string", "null"]},
    }


def provider_info() -> dict[str, Any]:
    """The distribution's connection types and their forms, for Airflow."""
    return {
        "package-name": "fast-cpt",
        "name": "Fast CPT",
        "description": "The host that trains, by SSH; a webhook that is told of runs; an MLflow server.",
        "connection-types": [
            {
                "connection-type": GpuHostHook.conn_type,
                "hook-class-name": "gpu_host.GpuHostHook",
                "hook-name": GpuHostHook.hook_name,
                "ui-field-behaviour": {
                    "hidden-fields": ["schema", "password"],
                    "relabeling": {},
                    "placeholders": {"port": "22"},
                },
                "conn-fields": {
                    "key_file": _field(
                        "Private key",
                        "its path on the Airflow host; empty: ssh-agent, ~/.ssh/config",
                    ),
                    "known_hosts": _field(
                        "Known hosts", "the file with the host's key; empty: ~/.ssh/known_hosts"
                    ),
                    "python": _field(
                        "Python there",
                        "one that has requirements-cluster.txt; empty: one is built there",
                    ),
                    "root": _field(
                        "Folder there",
                        "of all that is kept on the host; empty: fast_cpt in its home",
                    ),
                },
            },
            {
                "connection-type": "webhook",
                "hook-class-name": "notifications.WebhookHook",
                "hook-name": "Webhook",
                "ui-field-behaviour": {
                    "hidden-fields": ["schema", "host", "login", "port", "extra"],
                    "relabeling": {"password": "URL"},
                    "placeholders": {"password": "https://hooks.slack.com/services/..."},
                },
            },
            {
                "connection-type": "mlflow",
                "hook-class-name": "tracking.MlflowHook",
                "hook-name": "MLflow",
                "ui-field-behaviour": {
                    "hidden-fields": ["schema", "port", "extra"],
                    "relabeling": {"host": "URL", "password": "Password or token"},
                    "placeholders": {
                        "host": "https://mlflow.example.org",
                        "login": "empty: the password is a token",
                    },
                },
            },
        ],
    }
