"""The agent's entry points: for requests, and for the processes that it starts."""

import errno
import json
import os
import sys
import traceback
from contextlib import suppress

from fastcpt.cluster.agent.checkpoints import newest_checkpoint, take_in
from fastcpt.cluster.agent.cleaning import clean
from fastcpt.cluster.agent.files import Answer, listing, read_files, ready, verify
from fastcpt.cluster.agent.host import check, versions
from fastcpt.cluster.agent.hosts import node, on_hosts
from fastcpt.cluster.agent.jobs import poll, stop, submit
from fastcpt.cluster.agent.rent import keep_watched, note_asked, rent_here, watch
from fastcpt.cluster.agent.supervisor import supervise
from fastcpt.cluster.agent.watcher import attend

REQUESTS = {
    function.__name__: function
    for function in (
        *(check, verify, ready, listing, read_files, versions),
        *(submit, poll, stop, watch),
        *(newest_checkpoint, take_in, clean),
    )
}

# Errors that do not pass by themselves, unlike those of a file server that is starting.
STAYS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}


def answer(do: str, values: Answer) -> Answer:
    """A request's answer. A failure is an answer too: ``error``, or ``unavailable`` if it may pass.

    ``poll`` and ``stop`` are always retried: a running job is watched whatever happens to the disk.
    """
    try:
        if rent_here():
            note_asked()
            with suppress(OSError):
                keep_watched()
        return REQUESTS[do](**values)
    except Exception as error:
        why = f"'{do}' failed there: {traceback.format_exc().strip()}"
        if isinstance(error, OSError):
            why = f"'{do}' failed there: {error}"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                why += ". The disk there is full: free some, then clear this task"
        watching = do in ("poll", "stop")
        stays = not isinstance(error, OSError) or error.errno in STAYS
        return {"error" if stays and not watching else "unavailable": why}


def respond(do: str, values: str) -> None:
    """Print the answer to a request."""
    # files made here are readable by their owner only
    os.umask(0o077)
    print(json.dumps(answer(do, json.loads(values))))


def main() -> None:
    """Run the program as a job's supervisor, a node of a job on several hosts, or a watcher."""
    os.umask(0o077)
    what, *rest = sys.argv[1:]
    if what == "on-hosts":
        gpus, hosts, *command = rest
        sys.exit(on_hosts(int(gpus), hosts.split(",") if hosts else [], command))
    if what == "node":
        sys.exit(node(rest))
    if what == "watch":
        attend()
        sys.exit()
    supervise(os.path.abspath(what), None if rest[0] == "slurm" else int(rest[0]))
