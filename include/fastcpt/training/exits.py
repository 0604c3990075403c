"""Ends a training script with an exit code that tells whether a retry can help."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from fastcpt.exit_codes import CANNOT_HEAL, STOPPED


class TrainingError(ValueError):
    """The training cannot be done as asked; the message says what to change."""


class Stopped(Exception):
    """SIGTERM came; a checkpoint has been saved."""


def exit_code(main: Callable[[], Any]) -> int:
    """Run a script's ``main``: 0 done, 78 cannot heal (``ValueError``), 143 stopped, 1 otherwise.

    Errors go to stderr: those that cannot heal as one line, others with their traceback.
    """
    try:
        main()
    except Exception as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            # The launcher passes on the code of the first rank that ends, and ends the others.
            # So let rank 0 report the cause; other ranks may only see that it is gone.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
        if isinstance(error, Stopped):
            print(error, flush=True)
            return STOPPED
        if isinstance(error, ValueError):
            print(f"error: {error}", file=sys.stderr, flush=True)
            return CANNOT_HEAL
        traceback.print_exc()
        return 1
    return 0


def end(main: Callable[[], Any]) -> NoReturn:
    """End this process with ``exit_code``, without the interpreter's shutdown.

    During the shutdown a thread of gloo or NCCL sometimes aborts the process ("terminate called without an
    active exception"), after all work is done and on disk.
    """
    code = exit_code(main)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
