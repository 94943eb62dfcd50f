"""A log line says who wrote it, and nothing in a message can pretend to be another line."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from raysteer.errors import ConfigError
from raysteer.logs import log_as, log_version

HOSTILE = "a cat\n2026-01-01 00:00:00 ERROR driver of night: all is lost\x1b[2J\r\u2028[bold]{"


@pytest.fixture(autouse=True)
def _root_logger_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers = list(root.handlers)
    yield
    root.handlers[:] = handlers


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.split("\n")[:-1]


def test_a_json_line_has_all_fields_and_gives_the_message_back(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYSTEER_LOG", "json")
    log_as("night", "sampler", "sampler-0.1")
    log_version(3)
    logging.getLogger("cluster.buffer").warning("prompt %s", HOSTILE)
    (line,) = lines_of(capsys)
    record = json.loads(line)
    assert record.pop("time").endswith("+00:00")
    assert record == {
        "level": "WARNING",
        "run": "night",
        "role": "sampler",
        "member": "sampler-0.1",
        "version": 3,
        "logger": "cluster.buffer",
        "message": f"prompt {HOSTILE}",
    }


def test_a_text_line_has_the_same_fields_and_stays_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAYSTEER_LOG", raising=False)
    log_as("night", "buffer")
    logging.getLogger("cluster").warning(HOSTILE)
    log_version(0)
    logging.getLogger("cluster").error("over")
    first, second = lines_of(capsys)
    assert " WARNING buffer of night: a cat\\n2026-01-01" in first
    assert first.isprintable()
    assert second.endswith(" ERROR buffer of night at version 0: over")


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_exception_whose_message_has_line_breaks_cannot_forge_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv("RAYSTEER_LOG", form)
    log_as("night", "learner", "rank-0")
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logging.getLogger("learner").exception("the step failed")
    first, *others = lines_of(capsys)
    assert "the step failed" in first
    if form == "json":
        assert not others
        assert HOSTILE.split("\n")[1][:40] in json.loads(first)["traceback"]
    else:
        assert any("ValueError: a cat" in line for line in others)
        assert all(line.startswith("  | ") and line.isprintable() for line in others)


def test_a_process_that_takes_another_role_writes_each_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    log_as("night", "driver")
    log_as("day", "sampler", "sampler-1")
    logging.getLogger("x").warning("here")
    (line,) = lines_of(capsys)
    assert "sampler sampler-1 of day" in line


def test_an_unknown_format_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSTEER_LOG", "xml")
    with pytest.raises(ConfigError, match=r"RAYSTEER_LOG.*'xml'.*text or json"):
        log_as("night", "driver")
