"""The speed of sending a corpus to the cluster, compared with a plain ``cat | ssh cat`` of the same bytes.

    PYTHONPATH=include .env/airflow/bin/python benchmarks/transfer.py [--shards 16] [--megabytes 130]

Both send to an OpenSSH server on the loopback, alternately (the best of each counts). ``rate_ratio`` is
the transfer's rate divided by that of a plain ``ssh``; ``same_cipher_ratio`` by that of an ``ssh`` with
the transfer's ciphers. These cover only moving the bytes; ``whole_rate_ratio`` includes the digests, which
``cat`` does not check. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "include"), str(REPOSITORY / "include" / "scripts")]

import local_sshd  # noqa: E402

from fastcpt.cluster import transfer  # noqa: E402
from fastcpt.cluster.remote import FAST_CIPHERS, Remote, ask  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=16)
    parser.add_argument("--megabytes", type=int, default=130)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fast_cpt-transfer-") as folder:
        server = local_sshd.start_server(Path(folder) / "sshd")
        try:
            measured(Path(folder), server, arguments)
        finally:
            os.killpg(server["pid"], signal.SIGTERM)


def measured(folder: Path, server: dict[str, object], arguments: argparse.Namespace) -> None:
    remote = Remote(
        str(server["host"]),
        str(server["user"]),
        int(str(server["port"])),
        str(server["key_file"]),
        str(server["known_hosts"]),
    )
    shards = folder / "corpus"
    random_files(shards, arguments.shards, arguments.megabytes)
    files = transfer.files_of(shards)
    total = sum(file["bytes"] for file in files)
    plain, same_cipher, moved = [], [], []
    for number in range(arguments.rounds):
        plain.append(cat(remote, shards, folder / "plain", []))
        ciphers = ["-o", f"Ciphers=^{FAST_CIPHERS}"]
        same_cipher.append(cat(remote, shards, folder / "plain", ciphers))
        target = folder / f"there-{number}"
        sizes = {file["file"]: file["bytes"] for file in files}
        ask(remote, "verify", folder=str(target), files=[])
        began = time.monotonic()
        shares = transfer._shares(list(sizes), sizes, transfer.STREAMS)
        transfer._send(remote, shards, str(target), shares, sizes)
        moved.append(time.monotonic() - began)
        print(
            f"cat | ssh cat {plain[-1]:.2f} s, with the transfer's ciphers {same_cipher[-1]:.2f} s, "
            f"{transfer.STREAMS} rsync {moved[-1]:.2f} s",
            flush=True,
        )
        if number + 1 < arguments.rounds:
            shutil.rmtree(target)
    began = time.monotonic()
    ask(remote, "verify", folder=str(target), files=files)
    digests = time.monotonic() - began
    transfer.send(remote, shards, str(target), files)
    began = time.monotonic()
    again = transfer.send(remote, shards, str(target), files)
    second = time.monotonic() - began
    assert again["sent"] == 0
    shutil.rmtree(target)
    began = time.monotonic()
    transfer.send(remote, shards, str(target), files)
    whole = time.monotonic() - began
    print(
        json.dumps(
            {
                "rate_ratio": round(min(plain) / min(moved), 3),
                "same_cipher_ratio": round(min(same_cipher) / min(moved), 3),
                "unchanged_s": round(max(0.0, second - digests), 2),
                "megabytes": total / 1e6,
                "plain_mb_per_s": round(total / 1e6 / min(plain), 1),
                "transfer_mb_per_s": round(total / 1e6 / min(moved), 1),
                "digests_s": round(digests, 2),
                "whole_send_s": round(whole, 2),
                "whole_rate_ratio": round(min(plain) / whole, 3),
                "cores": os.cpu_count(),
            }
        )
    )


def random_files(folder: Path, count: int, megabytes: int) -> None:
    """Files of random bytes."""
    folder.mkdir()
    for number in range(count):
        content = os.urandom(megabytes * 1_000_000)
        (folder / f"cpt_train_shard_{number:02}.parquet").write_bytes(content)


def cat(remote: Remote, shards: Path, target: Path, options: list[str]) -> float:
    """Seconds of ``cat shards | ssh host 'cat > file'``."""
    target.unlink(missing_ok=True)
    began = time.monotonic()
    reading = subprocess.Popen(["cat", *sorted(map(str, shards.iterdir()))], stdout=subprocess.PIPE)
    subprocess.run(
        [*remote.ssh(shared=False), *options, "--", remote.host, f"cat > {target}"],
        stdin=reading.stdout,
        check=True,
    )
    seconds = time.monotonic() - began
    target.unlink()
    return seconds


if __name__ == "__main__":
    main()
