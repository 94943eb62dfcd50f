"""One process per run folder: a lock file with process id, host and start time, kept fresh while the run lives.

A lock is stale, and is taken over, when its process is gone from this host, or, for another host, when it has not been
refreshed for a minute (a retried job comes up on another host, so a dead one must not lock its run for ever).
"""

import atexit
import json
import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from raysteer.errors import StorageError

LOCK_FILE = "run.lock"
REFRESH_S = 10.0
LOOK_EVERY_S = 0.5
STALE_AFTER_S = 60.0


@dataclass(frozen=True)
class Holder:
    """Who holds a run: process id, host, start time of the process (seconds since the epoch), age of the last
    refresh.
    """

    pid: int
    host: str
    started: float
    age_s: float

    def alive(self) -> bool:
        """Whether the holder still runs, as far as one can tell from here."""
        if self.host != socket.gethostname():
            return self.age_s < STALE_AFTER_S
        return _start_time(self.pid) is not None and abs((_start_time(self.pid) or 0.0) - self.started) < 2.0

    def is_me(self) -> bool:
        """Whether this process holds it."""
        return self.pid == os.getpid() and self.host == socket.gethostname() and self.alive()


class RunLock:
    """Lock of one run folder; held until ``release`` or the end of the process.

    Raises:
        StorageError: another live process holds it.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.file = Path(run_dir) / LOCK_FILE
        self._stop = threading.Event()
        check_not_held(run_dir)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        mine = {"pid": os.getpid(), "host": socket.gethostname(), "started": _start_time(os.getpid())}
        beside = self.file.with_name(f".{LOCK_FILE}.{os.getpid()}")
        beside.write_text(json.dumps(mine) + "\n", encoding="utf-8")
        try:
            self._remove_stale()
            os.link(beside, self.file)  # fails if somebody else was quicker
        except FileExistsError:
            check_not_held(run_dir)
        except OSError:  # a file system without hard links
            os.replace(beside, self.file)
        finally:
            beside.unlink(missing_ok=True)
        threading.Thread(target=self._refresh, name="run-lock", daemon=True).start()
        atexit.register(self.release)

    def _remove_stale(self) -> None:
        """Move the present file aside and look again: of two that take over at once, one must not remove the other's
        lock.
        """
        aside = self.file.with_name(f".{LOCK_FILE}.stale.{os.getpid()}")
        try:
            os.rename(self.file, aside)
        except FileNotFoundError:
            return
        holder = _read(aside)
        if holder is not None and holder.alive() and not holder.is_me():
            os.replace(aside, self.file)
            check_not_held(self.file.parent)
        aside.unlink(missing_ok=True)

    def _refresh(self) -> None:
        while not self._stop.wait(REFRESH_S):
            try:
                os.utime(self.file)
            except OSError:
                return

    def release(self) -> None:
        """Give the run free. Idempotent; never removes somebody else's lock."""
        self._stop.set()
        atexit.unregister(self.release)
        holder = read_holder(self.file.parent)
        if holder is not None and holder.is_me():
            self.file.unlink(missing_ok=True)

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def read_holder(run_dir: str | Path) -> Holder | None:
    """Who holds the lock of a run folder, dead or alive; None if nobody does (or the file is torn, which no live
    holder leaves).
    """
    return _read(Path(run_dir) / LOCK_FILE)


def _read(file: Path) -> Holder | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return Holder(
            int(found["pid"]), str(found["host"]), float(found["started"]), time.time() - file.stat().st_mtime
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_not_held(run_dir: str | Path) -> None:
    """Refuse a run that another live process is training. One on another machine is waited for: if it lives, it gives a
    sign of life within REFRESH_S; if its machine was lost a moment ago, its lock is stale soon.

    Raises:
        StorageError: naming process and host.
    """
    holder = read_holder(run_dir)
    if holder is None or holder.is_me() or not holder.alive():
        return
    here = holder.host == socket.gethostname()
    if not here and _fell_silent(run_dir, holder):
        return
    raise StorageError(
        str(run_dir),
        f"this run is being trained by process {holder.pid}" + ("" if here else f" on {holder.host}"),
        f"stop that one (raysteer stop {Path(run_dir).name}), or give this one another run.name",
    )


def _fell_silent(run_dir: str | Path, holder: Holder) -> bool:
    while holder.alive():
        time.sleep(LOOK_EVERY_S)
        found = read_holder(run_dir)
        if found is None:
            return True
        if found.age_s < holder.age_s or found.started != holder.started:
            return False
        holder = found
    return True


def _start_time(pid: int) -> float | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None
