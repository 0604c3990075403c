"""Where a request, or a process that a job starts, comes in."""

import errno
import json
import os
import sys
import traceback
from contextlib import suppress

from fastcpt.cluster.agent.checkpoints import newest_checkpoint, take_in
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
        *(newest_checkpoint, take_in),
    )
}

# What does not pass by itself, unlike what a file server does while it starts.
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
    """A request's answer; what stood in its way is one too (``unavailable`` where it may pass).

    A job that runs is watched and ended through whatever happens to the disk: that is asked again.
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
    # what is made here is its owner's alone
    os.umask(0o077)
    print(json.dumps(answer(do, json.loads(values))))


def main() -> None:
    """The program as a process of its own: a job's supervisor, a part of a job of several hosts, a watcher."""
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
