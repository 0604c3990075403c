"""Everything on this machine: Airflow on SQLite, an SSH server that acts as the GPU host, one run.

    local_stack.py run [--data FOLDER] [--recipe NAME] [--tokenizer PATH] [--instructions FILE] [--set key=value]
    local_stack.py up | down

``run`` starts the four Airflow processes and an OpenSSH server of its own on the loopback,
triggers the DAG, shows its progress, prints the run's summary and ends all that it started. Its
exit code is 0 only if the run succeeded. ``up`` leaves everything running, with the UI; ``down``
ends it. State is kept under ``.fastcpt/`` (``FASTCPT_HOME``), so that a second run finds the first one's results.
"""

from __future__ import annotations

import argparse
import getpass
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import local_sshd
import process_groups
from airflow_api import DAG, USER, Api, clock, follow_run

from fastcpt import files
from fastcpt.cluster.agent.jobs import stop
from fastcpt.corpus.sample import SAMPLE_DOCUMENTS, generate_sample
from fastcpt.files import write_json
from fastcpt.reporting.record import record_folder
from fastcpt.reporting.summary import summary_text

REPOSITORY = Path(__file__).resolve().parents[2]
HOME = files.HOME.resolve()
AIRFLOW_HOME = HOME / "airflow"
STATE = HOME / "stack.json"
COMMANDS = ["api-server", "scheduler", "dag-processor", "triggerer"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument(
        "--data", default="", help="folder of documents; a generated sample without it"
    )
    run.add_argument("--recipe", default="")
    run.add_argument("--tokenizer", default="")
    run.add_argument("--instructions", default="")
    run.add_argument("--set", action="append", default=[], metavar="key=value", dest="overrides")
    commands.add_parser("up")
    commands.add_parser("down")
    arguments = parser.parse_args()
    # a closed terminal or a killed make ends the stack too
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, _interrupt)
    try:
        if arguments.command == "up":
            return up()
        if arguments.command == "down":
            return down()
        return run_once(conf_of(arguments))
    except KeyboardInterrupt:
        print("\nInterrupted; everything that was started has been ended.", file=sys.stderr)
        return 130
    except (RuntimeError, ValueError) as error:
        print(f"make {arguments.command}: {error}", file=sys.stderr)
        return 2


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


# What to run


def conf_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The trigger form's values for the command line's arguments."""
    conf: dict[str, Any] = {}
    if arguments.data:
        documents = Path(arguments.data).resolve()
        conf["recipe"] = arguments.recipe or "local"
        conf["documents"] = str(documents)
        tokenizer = arguments.tokenizer or (
            nearby_tokenizer(documents) if not arguments.recipe else ""
        )
        instructions = arguments.instructions or nearby_instructions(documents)
    else:
        sample = HOME / "sample"
        if not (sample / "instructions.jsonl").exists():
            generate_sample(sample, documents=SAMPLE_DOCUMENTS)
        conf["recipe"] = arguments.recipe or "sample"
        conf["documents"] = str(sample / "parsed")
        tokenizer = arguments.tokenizer
        instructions = arguments.instructions or str(sample / "instructions.jsonl")
    if tokenizer:
        conf["tokenizer"] = str(Path(tokenizer).resolve())
    if instructions:
        conf["instructions"] = str(Path(instructions).resolve())
    for pair in arguments.overrides:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, not '{pair}'")
        try:
            conf[key] = json.loads(value)
        except json.JSONDecodeError:
            conf[key] = value
    return conf


def nearby_tokenizer(documents: Path) -> str:
    """The only tokenizer near the documents: ``tokenizer.json`` there or in the ``tokenizers`` folder
    of one of the three parent folders; empty if there is none or more than one."""
    for folder in [documents, *documents.parents[:3]]:
        found = [*folder.glob("tokenizer.json"), *folder.glob("tokenizers/*/tokenizer.json")]
        if len(found) == 1:
            return str(found[0].parent)
    return ""


def nearby_instructions(documents: Path) -> str:
    """``instructions.jsonl`` or ``summaries.jsonl`` (also .gz, .zst), in or beside the documents' folder."""
    for folder in (documents.parent, documents):
        for name in ("instructions", "summaries"):
            for found in sorted(folder.glob(f"{name}.jsonl*")):
                return str(found)
    return ""


# The processes


def airflow_environment(cluster: local_sshd.Server, port: int) -> dict[str, str]:
    """The Airflow processes' environment: one configuration for all four."""
    connection = {
        "conn_type": "gpuhost",
        "host": "127.0.0.1",
        "login": getpass.getuser(),
        "port": cluster["port"],
        "extra": {
            "key_file": cluster["key_file"],
            "known_hosts": cluster["known_hosts"],
            "python": str(REPOSITORY / ".env/cluster/bin/python"),
            "root": str(HOME / "cluster"),
        },
    }
    return {
        **os.environ,
        "PATH": f"{REPOSITORY}/.env/airflow/bin:{os.environ['PATH']}",
        # plugins: Airflow looks for connection types before it adds the folder itself
        "PYTHONPATH": f"{REPOSITORY}/include:{REPOSITORY}/plugins",
        "AIRFLOW_HOME": str(AIRFLOW_HOME),
        "AIRFLOW_CONN_LOCAL_CLUSTER": json.dumps(connection),
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(port),
        "AIRFLOW__API__BASE_URL": f"http://127.0.0.1:{port}",
        "AIRFLOW__API__WORKERS": "1",
        "AIRFLOW__API_AUTH__JWT_SECRET": _secret("jwt_secret"),
        "AIRFLOW__CORE__FERNET_KEY": _secret("fernet_key"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(REPOSITORY / "dags"),
        "AIRFLOW__CORE__PLUGINS_FOLDER": str(REPOSITORY / "plugins"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
        "AIRFLOW__CORE__TEST_CONNECTION": "Enabled",
        "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "false",
        "AIRFLOW__CORE__EXECUTOR": "LocalExecutor",
        "AIRFLOW__CORE__PARALLELISM": "4",
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{port}/execution/",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": f"{USER}:admin",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(HOME / "passwords.json"),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{AIRFLOW_HOME}/airflow.db",
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "30",
        "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(free_port()),
        "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(free_port()),
        "AIRFLOW__SCHEDULER__CATCHUP_BY_DEFAULT": "false",
        # Airflow's default of a second would be most of a short task's time
        "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.2",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "false",
        "FASTCPT_HOME": str(HOME),
        **settings_of_forks(sys.platform),
    }


def settings_of_forks(platform: str) -> dict[str, str]:
    """Settings for macOS, where Airflow's DAG processor and triggerer fork; empty elsewhere.

    Apple's frameworks kill a forked process that first uses them after the fork. One setting turns
    this off in the Objective-C runtime; the other keeps Python's urllib from asking the system for
    its proxies, unless proxies are set.
    """
    if platform != "darwin":
        return {}
    settings = {"OBJC_DISABLE_INITIALIZE_FORK_SAFETY": "YES"}
    return settings if urllib.request.getproxies_environment() else {**settings, "no_proxy": "*"}


def _secret(name: str) -> str:
    """This machine's random secret, made once, readable only by its owner."""
    import base64

    file = HOME / name
    if not file.exists():
        with open(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), "w") as secret:
            secret.write(base64.urlsafe_b64encode(secrets.token_bytes(32)).decode())
    return file.read_text()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_stack() -> dict[str, Any]:
    """Start the SSH server and Airflow; returns the state for ``end_stack``, also kept in a file."""
    HOME.mkdir(mode=0o700, parents=True, exist_ok=True)
    if STATE.exists():
        left = json.loads(STATE.read_text())
        for started in left.get("processes", []):
            if started["command"] != "sshd" and process_groups.is_ours(started, left["marker"]):
                raise RuntimeError(
                    "Airflow is already running here. End it with `make down` first."
                )
        end_stack(left)
    port = free_port()
    state: dict[str, Any] = {"processes": [], "port": port, "marker": secrets.token_hex(8)}
    try:
        # gloo resolves the machine's hostname, which may fail on a Mac
        loopback = {"GLOO_SOCKET_IFNAME": "lo0"} if sys.platform == "darwin" else None
        cluster = local_sshd.start_server(HOME / "sshd", loopback)
        state["processes"].append(process_groups.entry(cluster["pid"], "sshd"))
        write_json(STATE, state)
        passwords = HOME / "passwords.json"
        if not passwords.exists():
            with open(os.open(passwords, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
                json.dump({USER: secrets.token_urlsafe(12)}, file)
        # without the second, processes that set their title overwrite the mark
        marks = {process_groups.MARK: state["marker"], "SPT_NOENV": "1"}
        settings = airflow_environment(cluster, port) | marks
        airflow = str(REPOSITORY / ".env/airflow/bin/airflow")
        _call([airflow, "db", "migrate"], settings)
        (HOME / "logs").mkdir(exist_ok=True)
        for command in COMMANDS:
            with (HOME / "logs" / f"{command}.log").open("ab") as log:
                process = subprocess.Popen(
                    [airflow, command],
                    env=settings,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    cwd=HOME,
                )
            state["processes"].append(process_groups.entry(process.pid, f"airflow {command}"))
            write_json(STATE, state)
        state["url"] = f"http://127.0.0.1:{port}"
        state["settings"] = {
            key: settings[key] for key in settings if key.startswith(("AIRFLOW", "FASTCPT"))
        }
        with Api(state["url"], HOME) as api:
            api.wait_until_ready()
    except BaseException:
        end_stack(state)
        raise
    write_json(STATE, {key: value for key, value in state.items() if key != "settings"})
    return state


def _call(command: list[str], settings: dict[str, str]) -> None:
    done = subprocess.run(
        command, env=settings, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=HOME
    )
    if done.returncode:
        raise RuntimeError(
            f"'{' '.join(command[1:3])}' failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )


def end_stack(state: dict[str, Any]) -> None:
    """End every process group of the stack, and no other with a reused pid."""
    # a second signal (make and the shell send one each) must not leave half of it running
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.SIG_IGN)
    # jobs outlive their connection, but must not outlive the local host
    for job in sorted((HOME / "cluster" / "jobs").glob("*")):
        stop(str(HOME / "cluster"), job.name)
    if "processes" not in state:
        print(f"{STATE} is of an older version and says too little to end anything safely.")
        print(f"Look at these processes and end them by hand: {state.get('pids')}")
    for stranger in process_groups.end_groups(state.get("processes", []), state["marker"]):
        print(
            f"Process {stranger['pid']} is not (or no longer) this stack's '{stranger['command']}': left alone."
        )
    STATE.unlink(missing_ok=True)


def up() -> int:
    """Start everything and leave it running."""
    state = start_stack()
    password = json.loads((HOME / "passwords.json").read_text())[USER]
    print(f"Airflow: {state['url']}  user {USER}  password {password}")
    print(f"The DAG: {state['url']}/dags/{DAG}   End all of it with `make down`.")
    return 0


def down() -> int:
    """End everything that ``up`` started, if anything."""
    if STATE.exists():
        end_stack(json.loads(STATE.read_text()))
        print("Ended.")
    else:
        print("Nothing is running.")
    return 0


def run_once(conf: dict[str, Any]) -> int:
    """Start everything, run the DAG once with ``conf``, print its summary, end everything."""
    began = time.monotonic()
    outcome = "failed"
    print(f"Starting Airflow and the cluster's SSH server (logs: {HOME}/logs) ...", flush=True)
    state = start_stack()
    try:
        with Api(state["url"], HOME) as api:
            api.log_in()
            api.end_unfinished_runs()
            run = api.trigger(conf)
            print(f"{clock(began)}  run {run}: {json.dumps(conf)}", flush=True)
            outcome = follow_run(api, run, began)
        record = record_folder(HOME, run)
        if record.is_dir():
            print(summary_text(record))
    finally:
        end_stack(state)
    print(
        f"The run {'succeeded' if outcome == 'success' else 'failed'} after {clock(began).strip()}."
    )
    return 0 if outcome == "success" else 1


if __name__ == "__main__":
    sys.exit(main())
