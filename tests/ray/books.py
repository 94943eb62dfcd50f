"""One check of a finished run's books, over everything it wrote: checkpoint, ledger, metrics and journal must tell the
same story, in which every group was trained on exactly once or dropped for a named reason.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cluster.journal import read_journal
from learner.checkpoint import latest_checkpoint
from learner.records import read_rows


def trained_tickets(run_dir: Path) -> list[list[int]]:
    """Tickets by step, along the checkpoint lineage: rows of steps that were done again have been replaced."""
    return [row["tickets"] for row in read_rows(run_dir / "metrics.jsonl")]


def assert_balanced(run_dir: Path, steps: int, groups_per_step: int) -> None:
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    assert checkpoint is not None and checkpoint.step == steps
    ledger = json.loads((run_dir / "ledger.json").read_text())["ledger"]
    dropped = {int(ticket): reason for ticket, reason in checkpoint.ledger["dropped"].items()}

    rows = read_rows(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, steps + 1)), "each step once, in order"
    trained = [ticket for row in rows for ticket in row["tickets"]]
    assert len(trained) == len(set(trained)) == steps * groups_per_step, "each group once"
    closed = {*range(checkpoint.ledger["closed_below"])} - dropped.keys() | {*checkpoint.ledger["committed_sparse"]}
    assert set(trained) == closed, "what was trained on is what the checkpoint calls committed"
    assert not dropped.keys() & set(trained) and all(dropped.values()), "a dropped group has a reason and was not used"

    terms = ("in_flight", "ready", "delivered", "committed")
    assert ledger["leased"] == sum(ledger[term] for term in terms) + sum(ledger["dropped"].values())
    assert (ledger["committed"], ledger["delivered"]) == (len(trained), 0)
    assert sum(ledger["dropped"].values()) == len(dropped)

    journal = read_journal(run_dir / "journal")
    rewards = dict(zip(journal["ticket"].to_pylist(), journal["reward"].to_pylist(), strict=True))
    assert set(trained) <= rewards.keys(), "the journal holds whatever was trained on"
    for row in rows:
        mean = float(np.mean([rewards[ticket] for ticket in row["tickets"]]))
        assert row["reward/mean"] == pytest.approx(mean, abs=1e-5), "with the rewards it was trained on"


def assert_same_adapter(found: Path | None, expected: Path | None) -> None:
    """Bit for bit."""
    from diffusion.adapters import load_adapter_file

    assert found is not None and expected is not None, "a run has not finished"
    ours, theirs = load_adapter_file(found), load_adapter_file(expected)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
