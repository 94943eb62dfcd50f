"""``raysteer stop``: a request left in the run folder, which the loop that supervises the run looks for.

A file needs no connection, no token and no signal across machines, and works wherever the run's storage is. The run
ends as on Ctrl-C: with a checkpoint after the step it is in.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from cluster.runlock import read_holder
from cluster.storage import RunFolder, write_json
from raysteer.errors import DeadlineExceeded, StorageError, UserError

LOOK_EVERY_S = 0.5


def find_run(run: str, storage: str) -> RunFolder:
    """Folder of a run given by name or by its path.

    Raises:
        UserError: there is none.
    """
    for path in (Path(storage).expanduser() / run, Path(run).expanduser()):
        if RunFolder(path).recipe.is_file():
            return RunFolder(path)
    raise UserError(f"run {run}", f"there is none in {storage}", "give its name and --storage, or its folder")


def request_stop(folder: RunFolder) -> None:
    """Ask whoever trains this run to end.

    Raises:
        UserError: nobody does.
        StorageError: the request cannot be written.
    """
    holder = read_holder(folder.path)
    if holder is None or not holder.alive():
        raise UserError(f"run {folder.path.name}", "nobody is training it", "raysteer status shows how it ended")
    try:
        write_json(folder.stop_request, {"host": socket.gethostname(), "pid": os.getpid(), "written": time.time()})
    except OSError as error:
        raise StorageError(
            str(folder.stop_request), f"cannot be written ({error.strerror})", "stop it as a user who may write there"
        ) from None


def withdraw_stop(folder: RunFolder) -> None:
    """Forget a request: one that was left to an earlier life of the run must not end this one."""
    folder.stop_request.unlink(missing_ok=True)


def wait_for_end(folder: RunFolder, timeout_s: float, notify: Callable[[str], None]) -> None:
    """Until the process that trains the run has let go of it.

    Raises:
        DeadlineExceeded: it has not. The request stands.
    """
    holder = first = read_holder(folder.path)
    if first is not None:
        notify(f"waiting for process {first.pid} on {first.host} to end its step and write a checkpoint")
    began = time.monotonic()
    while holder is not None and holder.alive() and first is not None and holder.started == first.started:
        if time.monotonic() - began > timeout_s:
            hint = "the request stands; raysteer status shows what it is doing"
            raise DeadlineExceeded(f"run {folder.path.name} to end", time.monotonic() - began, hint)
        time.sleep(LOOK_EVERY_S)
        holder = read_holder(folder.path)
