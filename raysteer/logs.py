"""Log lines that say which run, role and member they come from, and under which adapter version.

Every process of a run calls `log_as` once. With ``RAYSTEER_LOG=json`` a record is one JSON object on one line, else one
readable line with the same fields:

    2026-11-21 16:03:12 WARNING sampler sampler-0.1 of glyphs at version 12: ticket 44: lease of sampler-0 expired

Whatever a message holds (a prompt, an error of somebody else's code), it cannot make a line that looks like another
record: line breaks and control characters are escaped.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TextIO

from raysteer.errors import ConfigError
from raysteer.text import one_line

FORMAT_VARIABLE = "RAYSTEER_LOG"
FORMATS = ("text", "json")


@dataclass
class _Identity:
    """Who this process is. `member` is empty for what there is only one of; `version` is None before the first."""

    run: str
    role: str
    member: str = ""
    version: int | None = None


class _Handler(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is at that moment, so that a live display can put the lines above itself."""

    def __init__(self, identity: _Identity, form: str) -> None:
        logging.Handler.__init__(self, logging.WARNING)
        self.identity = identity
        self.setFormatter(_Json(identity) if form == "json" else _Text(identity))

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _Json(logging.Formatter):
    def __init__(self, identity: _Identity) -> None:
        super().__init__()
        self.identity = identity

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "run": self.identity.run,
            "role": self.identity.role,
            "member": self.identity.member,
            "version": self.identity.version,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _Text(logging.Formatter):
    def __init__(self, identity: _Identity) -> None:
        super().__init__()
        self.identity = identity

    def format(self, record: logging.LogRecord) -> str:
        identity = self.identity
        who = " ".join(part for part in (identity.role, identity.member) if part)
        at = "" if identity.version is None else f" at version {identity.version}"
        when = _time(record).strftime("%Y-%m-%d %H:%M:%S")
        line = f"{when} {record.levelname} {who} of {identity.run}{at}: {one_line(record.getMessage())}"
        if record.exc_info:
            trace = self.formatException(record.exc_info).splitlines()
            line += "".join(f"\n  | {one_line(part)}" for part in trace)
        return line


def log_as(run: str, role: str, member: str = "") -> None:
    """Send this process's warnings and errors to stderr under this identity; a later call replaces an earlier one.

    Args:
        run: name of the run.
        role: "driver", "sampler", "reward_worker", "learner", "buffer" or another service.
        member: id among those of the role, such as "sampler-0.1" or "rank-0"; empty when there is only one.

    Raises:
        ConfigError: RAYSTEER_LOG is neither "text" nor "json".
    """
    form = os.environ.get(FORMAT_VARIABLE) or "text"
    if form not in FORMATS:
        raise ConfigError(FORMAT_VARIABLE, form, f"set it to {' or '.join(FORMATS)}, or leave it out")
    root = logging.getLogger()
    for handler in _handlers():
        root.removeHandler(handler)
    root.addHandler(_Handler(_Identity(run, role, member), form))


def log_as_actor(_actor: object, run: str, role: str, member: str) -> None:
    """`log_as`, as Ray's ``__ray_call__`` wants it: the actor comes first."""
    log_as(run, role, member)


def log_version(version: int) -> None:
    """From now on this process's lines carry this adapter version."""
    for handler in _handlers():
        handler.identity.version = version


def _handlers() -> list[_Handler]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, _Handler)]


def _time(record: logging.LogRecord) -> datetime:
    return datetime.fromtimestamp(record.created, UTC)
