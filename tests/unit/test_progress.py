"""What a person sees: the same truth in a terminal, in a narrow one and in a file, whatever is in the messages."""

from __future__ import annotations

import asyncio
import io
import os
import pty
import re
import threading
from typing import Any

import pytest
from rich.console import Console

from cluster.desk import Desk
from cluster.live import LiveDisplay, trend
from cluster.progress import PlainLines, Progress, phase_of, readable_seconds
from tests.snapshots import fresh_snapshot, ledger

FIGURES = {"step": 1, "reward/mean": 0.25, "staleness/max": 1.0, "throughput/images_per_s": 12.345}
HOSTILE = "died: [bold]x[/bold] [/nothing] [link=http://a]\n\x1b[2Jstep 9/9 done"
WORKING = {
    "samplers": {"sampler-0": {"waiting": False}, "sampler-1": {"waiting": True}},
    "reward_workers": ["reward_worker-0"],
    "learners": {0: 1},
    "learner": "learning",
    "open": {1: ("sampling", "sampler-0"), 2: ("scoring", "sampler-0")},
}


def working(**changes: Any) -> dict[str, Any]:
    return fresh_snapshot(**WORKING | changes)


def plain(steps: int = 30, **settings: Any) -> tuple[Progress, io.StringIO]:
    stream = io.StringIO()
    return Progress(steps, stream=stream, **settings), stream


def test_outside_a_terminal_a_step_is_one_line_whose_columns_stay_where_they_are() -> None:
    progress, stream = plain()
    with progress:
        progress.on_step(FIGURES)
        progress.on_step({"step": 12, "reward/mean": -0.1234, "inappropriate/unsafe_prompts": 0.5})
    first, second = stream.getvalue().splitlines()
    assert first.startswith("step  1/30  reward     0.25  inappropriate        -  alignment        -  lag        1  ")
    for label in ("reward", "inappropriate", "alignment", "lag", "images/s", "left"):
        assert first.index(label) == second.index(label)


def test_the_remaining_time_follows_the_pace_of_the_last_steps_and_not_the_start() -> None:
    now = [0.0]
    progress, stream = plain(steps=10, clock=lambda: now[0])
    with progress:
        for step, seconds in ((1, 600.0), (2, 10.0), (3, 10.0)):
            now[0] += seconds
            progress.on_step({"step": step})
    assert [line.split("left ")[1] for line in stream.getvalue().splitlines()] == ["-", "1 min 20 s", "1 min 10 s"]


def test_steps_that_come_again_after_a_restart_do_not_make_the_remaining_time_negative() -> None:
    now = [0.0]
    progress, stream = plain(steps=10, clock=lambda: now[0])
    for step in (4, 5, 4, 5):
        now[0] += 10.0
        progress.on_step({"step": step})
    assert [line.split("left ")[1] for line in stream.getvalue().splitlines()] == ["-", "50 s", "-", "50 s"]


def test_what_goes_wrong_is_said_once_and_an_earlier_runs_drops_are_not_news() -> None:
    progress, stream = plain()
    with progress:
        progress.on_snapshot(working(ledger=ledger(dropped={"old": 3})))
        later = ledger(dropped={"old": 3, "reward_timeout": 2}, events={"lease_expired": 1, "leased_again": 1})
        progress.on_snapshot(working(ledger=later))
        progress.on_snapshot(working(ledger=later))
    assert stream.getvalue().splitlines() == [
        "running",
        "dropped: reward_timeout (x2)",
        "lease expired: the group goes to another sampler",
    ]


def test_a_message_with_line_breaks_or_markup_is_one_plain_line() -> None:
    progress, stream = plain()
    with progress:
        progress.message(HOSTILE)
    assert stream.getvalue() == "died: [bold]x[/bold] [/nothing] [link=http://a]\\n\\x1b[2Jstep 9/9 done\n"


@pytest.mark.parametrize(
    ("changes", "phase"),
    [
        ({"learners": {}, "samplers": {}}, "starting learners, samplers"),
        ({"reward_workers": []}, "starting reward workers"),
        ({"learner": "saving"}, "saving"),
        ({"learner": "learning"}, "learning"),
        ({"learner": "waiting"}, "drawing"),
        ({"learner": "waiting", "open": {1: ("scoring", "a")}}, "scoring"),
        ({"stop": "SIGINT"}, "stopping"),
        ({"stop": "SIGINT", "failure": ValueError()}, "failing"),
    ],
)
def test_the_phase_says_what_everybody_waits_for(changes: dict[str, Any], phase: str) -> None:
    assert phase_of(working(**changes)) == phase


def drawn(width: int, snapshot: dict[str, Any] | None, steps: int = 3) -> list[str]:
    """The lines of the live display in a terminal of this width."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, record=True)
    display = LiveDisplay(io.StringIO(), 60, 0, console)
    for step in range(steps):
        display.step(FIGURES | {"reward/mean": 0.1 * step}, step + 1, 500.0)
    if snapshot is not None:
        display.snapshot(snapshot)
    console.print(display)
    return console.export_text().splitlines()


def test_the_live_display_shows_phase_bar_figures_members_and_ledger() -> None:
    counts = ledger(ready=4, delivered=2, committed=8, dropped={"x": 1})
    lines = drawn(100, working(ledger=counts, members={"sampler": 3, "reward_worker": 1}))
    assert re.fullmatch(r"learning +[━╸╺]+ +3/60 +\d+ s +about (8 min 20 s|8 min 19 s) left *", lines[0])
    assert lines[1].startswith("reward 0.2 ▁▅█  lag 1  images/s 12.3")
    assert lines[2].rstrip() == "samplers 2/3 (1 waiting)  reward workers 1/1  learner ranks 1"
    assert lines[3].rstrip() == "groups 1 drawing  1 scoring  4 ready  10 learned  1 dropped"


@pytest.mark.parametrize("width", [10, 20, 40, 80, 200])
@pytest.mark.parametrize("started", [False, True])
def test_the_live_display_never_wraps(width: int, started: bool) -> None:
    snapshot = working(samplers={}, learners={}) if started else None
    lines = drawn(width, snapshot, steps=30 if started else 0)
    assert len(lines) == (4 if started else 2)
    assert all(len(line) <= width for line in lines)


def in_a_terminal(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    """What a real terminal receives while a run is shown in it."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm-256color"} | environment).items():
        monkeypatch.setenv(name, value)
    master, slave = pty.openpty()
    received: list[bytes] = []

    def read() -> None:
        try:
            while chunk := os.read(master, 4096):
                received.append(chunk)
        except OSError:  # how Linux says that the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w", encoding="utf-8") as terminal, Progress(3, stream=terminal) as progress:
        progress.message(HOSTILE)
        progress.on_snapshot(working())
        progress.on_step(FIGURES)
    reader.join(timeout=20)
    os.close(master)
    return b"".join(received).decode()


def test_in_a_terminal_messages_are_data_and_the_display_is_live(monkeypatch: pytest.MonkeyPatch) -> None:
    text = in_a_terminal(monkeypatch)
    assert "[bold]x[/bold] [/nothing] [link=http://a]\\n\\x1b[2Jstep 9/9 done" in text
    assert "\x1b[2J" not in text, "a message cannot clear the screen"
    assert "━" in text and "1/3" in text
    assert re.search(r"\x1b\[[0-9;]*3[0-9]", text), "colours"


def test_no_color_means_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    text = in_a_terminal(monkeypatch, NO_COLOR="1")
    assert "1/3" in text
    assert not re.search(r"\x1b\[[0-9;]*(3|9)[0-7][;m]", text)


def test_a_terminal_that_cannot_redraw_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    text = in_a_terminal(monkeypatch, TERM="dumb")
    assert "step 1/3  reward" in text
    assert "\x1b" not in text


def test_a_trend_spans_its_own_least_and_largest_value() -> None:
    assert trend([3.0, 1.0, 2.0]) == "█▁▅"
    assert trend([0.5, 0.5]) == "▅▅"


def test_seconds_are_readable() -> None:
    assert [readable_seconds(s) for s in (5, 75, 3700)] == ["5 s", "1 min 15 s", "1 h 01 min"]


def test_plain_lines_say_each_phase_once() -> None:
    stream = io.StringIO()
    view = PlainLines(stream, 3)
    sequence: list[dict[str, Any]] = [
        {"samplers": {}},
        {"samplers": {}},
        {},
        {"learner": "saving"},
        {"learner": "waiting"},
        {"stop": "x"},
    ]
    for changes in sequence:
        view.snapshot(working(**changes))
    assert stream.getvalue().splitlines() == ["starting samplers", "running", "stopping"]


def test_a_run_in_rounds_says_which_part_of_it_this_is() -> None:
    progress, stream = plain(title="round 2 of 3, generating")
    with progress:
        progress.on_snapshot(working())
    assert stream.getvalue().splitlines() == ["round 2 of 3, generating", "running"]
    console = Console(file=io.StringIO(), width=100, force_terminal=True, record=True)
    display = LiveDisplay(io.StringIO(), 60, 0, console, title="round 2 of 3, learning")
    for state, said in (("learning", "round 2 of 3: learning "), ("saving", "round 2 of 3, learning: saving ")):
        display.snapshot(working(learner=state))
        console.print(display)
        assert console.export_text().startswith(said)


def test_a_learner_on_a_dataset_waits_for_no_sampler() -> None:
    async def ask() -> dict[str, Any]:
        desk = Desk(3, 2, 4, {"flat": 1})
        await desk.rewind(0, {0: 1})
        await desk.may_go_on(0)
        return await desk.snapshot()

    alone = asyncio.run(ask())
    assert phase_of(alone) == "learning"
    assert phase_of(alone | {"learners": {}}) == "starting learners"
    lines = "\n".join(drawn(100, alone))
    assert "learner ranks 1" in lines and "0 learned  1 left out" in lines
    assert "samplers" not in lines and "drawing" not in lines
