"""The journal keeps every scored group once, with all that an offline objective needs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.journal import JournalWriter, as_float32, latents_of, read_journal


def row(ticket: int, reward: float = 0.5) -> dict[str, Any]:
    return {
        "ticket": ticket,
        "prompt": f"prompt {ticket}",
        "prompt_class": "safe",
        "category": "hate" if ticket == 0 else None,
        "truncated": False,
        "seeds": [ticket, 2**62 + ticket],
        "step_seed": 2**62 + 1,
        "version": ticket // 2,
        "checksum": "abc",
        "sampler": "sampler-0",
        "reward_worker": "reward_worker-0",
        "reward": np.array([reward, -reward], np.float32),
        "parts": {"alignment": np.array([0.1, 0.2], np.float32)},
        "sample_s": 1.0,
        "score_s": 0.1,
        "scored_at": 12.0,
    }


def latents(ticket: int) -> np.ndarray:
    return np.random.default_rng(ticket).normal(size=(2, 4, 3, 3)).astype(np.float32)


def test_rows_come_back_exactly_and_in_ticket_order(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path, {}, rows_per_part=2)
    for ticket in (1, 0, 2):
        writer.append(row(ticket), latents(ticket))
    writer.flush()
    table = read_journal(tmp_path)
    assert table["ticket"].to_pylist() == [0, 1, 2]
    assert table["seeds"].to_pylist()[1] == [1, 2**62 + 1]
    assert table["reward"].to_pylist()[0] == [0.5, -0.5]
    assert table["category"].to_pylist() == ["hate", None, None]
    assert table["reward.alignment"].to_pylist()[2] == pytest.approx([0.1, 0.2])
    np.testing.assert_array_equal(latents_of(table), np.stack([latents(ticket) for ticket in range(3)]))


def test_a_group_that_was_drawn_again_counts_once_and_the_last_time(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path, {})
    writer.append(row(0, 0.1), latents(0))
    writer.flush()
    again = JournalWriter(tmp_path, {})
    again.append(row(0, 0.9), latents(7))
    again.flush()
    table = read_journal(tmp_path)
    assert table.num_rows == 1
    assert table["reward"].to_pylist()[0][0] == pytest.approx(0.9)
    np.testing.assert_array_equal(latents_of(table)[0], latents(7))


def test_latents_that_died_with_their_sampler_do_not_cost_the_row(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path, {})
    writer.append(row(0), latents(0))
    writer.append(row(1), None)
    assert writer.flush() == 2
    table = read_journal(tmp_path)
    assert table["ticket"].to_pylist() == [0, 1]
    assert table["final_latents"].null_count == 1


def test_rows_that_the_disk_refused_are_written_once_it_has_room(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path / "journal", {})
    writer.append(row(0), latents(0))
    writer.append(row(1), None)
    (tmp_path / "journal").rename(tmp_path / "away")
    with pytest.raises(OSError):
        writer.flush()
    (tmp_path / "away").rename(tmp_path / "journal")
    writer.flush()
    assert read_journal(tmp_path / "journal")["ticket"].to_pylist() == [0, 1]


def test_nothing_appended_writes_nothing(tmp_path: Path) -> None:
    assert JournalWriter(tmp_path, {}).flush() == 0
    with pytest.raises(FileNotFoundError, match="no journal"):
        read_journal(tmp_path)


def test_bfloat16_bits_become_the_same_numbers_in_float32() -> None:
    torch = pytest.importorskip("torch")
    values = torch.randn(100, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    bits = values.view(torch.uint16).numpy()
    np.testing.assert_array_equal(as_float32(bits, "bfloat16"), values.float().numpy())
