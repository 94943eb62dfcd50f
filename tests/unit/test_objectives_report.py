"""What `benchmarks.objectives` says of its runs follows from the points it has measured."""

from pathlib import Path

import pytest

from benchmarks import documents
from benchmarks.objectives_report import FIGURES, Point, cost_of, tables


def curve(method: str, rewards: list[float], begins_at: int = 0) -> list[Point]:
    def point(step: int, reward: float) -> Point:
        figures = {name: {"value": reward, "low": reward - 0.1, "high": reward + 0.1} for name in FIGURES}
        return Point(method, 0, step, begins_at + 100 * step, 2.0 * step, 10 * step, None, figures)

    return [point(step, reward) for step, reward in enumerate(rewards)]


def test_the_cost_of_a_reward_lies_on_the_line_to_the_first_checkpoint_that_reaches_it() -> None:
    points = curve("a", [0.2, 0.4, 0.3, 0.6])
    assert cost_of(points, 0.3, "forwards") == pytest.approx(50)
    assert cost_of(points, 0.4, "forwards") == pytest.approx(100), "a checkpoint that reaches it just so"
    assert cost_of(points, 0.5, "seconds") == pytest.approx(2 * (2 + 2 / 3)), "not before it fell again"
    assert cost_of(points, 0.7, "images") is None


def test_drawing_a_dataset_is_paid_for_before_the_first_step() -> None:
    assert cost_of(curve("a", [0.2, 0.4], begins_at=1000), 0.3, "forwards") == pytest.approx(1050)


def test_runs_are_compared_at_a_reward_that_all_have_reached() -> None:
    text = tables([*curve("a", [0.2, 0.6]), *curve("b", [0.2, 0.5, 0.4])])
    assert "a reward of 0.500" in text
    assert "| a | 0 | 75 | 2 | 8 |" in text and "| b | 0 | 100 | 2 | 10 |" in text
    assert "| b | 0 | 2 | 0.400 [0.300, 0.500] |" in text and "| 0.500 (1) |" in text, "where it ends, and its best"


def test_a_table_is_put_in_the_place_of_the_one_before_and_nowhere_else(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("above\n<!-- command -->\nold\n<!-- end -->\nbelow\n")
    for text in ("new", "newer"):
        documents.write(document, "command", text)
    assert document.read_text() == "above\n<!-- command -->\n\nnewer\n\n<!-- end -->\nbelow\n"
    with pytest.raises(ValueError, match="has no place for a table"):
        documents.write(document, "another command", "new")
