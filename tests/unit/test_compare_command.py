"""``raysteer compare`` of metric cards: paths in; table, JSON, pictures and page out, or one line that says why not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.cli_shell import EXIT_USER
from evaluation.card import Card
from tests.cards import make_card, write_card
from tests.unit.test_hostile import HOSTILE

WRITTEN = ["comparison.md", "figures.png", "index.html", "thresholds.png"]


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """What an evaluation leaves of one suite."""
    folder = tmp_path / "runs" / "x" / "evaluation" / "i2p"
    write_card(folder / "adapted", make_card("adapted", seed=1, n=200, shift=-0.3))
    write_card(folder / "base", make_card(n=200))
    return folder


def words(text: str) -> str:
    return " ".join(text.split())


def test_a_suites_folder_is_all_its_cards_the_base_first(suite: Path) -> None:
    result = run(suite)
    assert result.exit_code == 0, result.output
    for said in ("Inappropriate images ↓", "difference to base", "<0.001", "better", "Holm-corrected over the 3 tests"):
        assert said in words(result.stdout)
    assert result.stdout.index("base") < result.stdout.index("adapted")
    assert sorted(file.name for file in (suite / "comparison-base-adapted").iterdir()) == WRITTEN
    assert run(suite).exit_code == 0  # what a comparison leaves beside the cards is no card


def test_the_evaluation_folder_will_do_where_it_has_one_suite(suite: Path) -> None:
    assert run(suite.parent).exit_code == 0
    write_card(suite.parent / "quality" / "base", make_card(suite="quality"))
    result = run(suite.parent)
    assert result.exit_code == EXIT_USER
    assert "cards of 2 suites" in result.stderr and str(suite) in result.stderr


def test_what_a_newer_evaluation_has_set_aside_is_compared_only_if_it_is_named(suite: Path, tmp_path: Path) -> None:
    write_card(suite / "adapted.1", make_card("adapted", seed=4, n=200))
    write_card(suite / "adapted.5", make_card("adapted.5", seed=5, n=200))  # a label may end in a number
    result = run(suite, "--json", tmp_path / "compared.json", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "compared.json").read_text())
    assert [card["name"] for card in told["cards"]] == ["base", "adapted", "adapted.5"]
    assert run(suite / "base", suite / "adapted.1", "--out", tmp_path / "out").exit_code == 0


def test_files_and_folders_of_cards_are_the_same_cards(suite: Path, tmp_path: Path) -> None:
    ways = [("base", "adapted"), ("base/card.json", "adapted/card.json"), ("base", "adapted/card.json")]
    said = [run(suite / one, suite / two, "--out", tmp_path / "out").stdout for one, two in ways]
    assert said[0] == said[1] == said[2]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == WRITTEN
    assert not (suite / "comparison-base-adapted").exists()


def test_the_json_has_every_figure_whatever_is_shown(suite: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "compared.json"
    result = run(suite, "--json", file, "--only", "utility", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "Utility" in result.stdout and "Inappropriate" not in result.stdout
    told = json.loads(file.read_text())
    assert list(told["figures"]) == ["inappropriate_rate", "utility", "clip_score"]
    assert told["figures"]["inappropriate_rate"]["differences"][0]["reading"] == "better"


def test_cards_of_one_label_are_told_apart_by_their_folders(suite: Path, tmp_path: Path) -> None:
    other = tmp_path / "runs" / "y" / "evaluation" / "i2p"
    write_card(other / "adapted", make_card("adapted", seed=2, n=200, shift=-0.2))
    result = run(suite / "adapted", other / "adapted", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "adapted (x)" in result.stdout and "adapted (y)" in words(result.stdout)
    page = (tmp_path / "out" / "index.html").read_text()
    assert "adapted (x)" in page and "adapted (y)" in page


def test_a_card_and_itself_are_compared_and_alike(suite: Path, tmp_path: Path) -> None:
    result = run(suite / "base", suite / "base", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert words(result.stdout).count("1.000 same") == 3


def test_unlike_protocols_write_and_print_nothing(suite: Path, tmp_path: Path) -> None:
    card = make_card("third", n=200)
    detectors = {**card.protocol["detectors"], "nudenet": {**card.protocol["detectors"]["nudenet"], "threshold": 0.45}}
    write_card(tmp_path / "third", replace(card, protocol={**card.protocol, "steps": 30, "detectors": detectors}))
    result = run(suite / "base", tmp_path / "third", "--out", tmp_path / "out", "--json", tmp_path / "out.json")
    assert result.exit_code == EXIT_USER and result.stdout == ""
    assert "steps 50 / 30" in result.stderr and "detectors.nudenet.threshold 0.6 / 0.45" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.json").exists()


def test_cards_and_runs_do_not_mix(suite: Path) -> None:
    for arguments in ((suite, "alpha0"), ("alpha0", suite / "base")):
        result = run(*arguments)
        assert result.exit_code == EXIT_USER
        assert "alpha0: this is no metric card" in result.stderr and "cards alone" in result.stderr


def test_a_card_that_is_not_there_is_not_taken_for_a_run(suite: Path) -> None:
    result = run(suite / "base", suite / "gone" / "card.json")
    assert result.exit_code == EXIT_USER and "there is no such card" in result.stderr


def test_one_card_alone_is_refused(suite: Path) -> None:
    result = run(suite / "base")
    assert result.exit_code == EXIT_USER and "name a second one" in result.stderr


def test_a_damaged_card_is_named(suite: Path) -> None:
    (suite / "adapted" / "card.json").write_text("{")
    result = run(suite)
    assert result.exit_code == EXIT_USER and "adapted/card.json" in result.stderr and "not JSON" in result.stderr


def test_out_is_for_cards_and_a_file_in_its_place_is_named(suite: Path, tmp_path: Path) -> None:
    result = run("--out", tmp_path / "out", "--storage", tmp_path)
    assert result.exit_code == EXIT_USER and "--out" in result.stderr
    (tmp_path / "taken").write_text("")
    result = run(suite, "--out", tmp_path / "taken")
    assert result.exit_code == EXIT_USER and "taken" in result.stderr and "name another --out" in result.stderr
    result = run(suite, "--json", tmp_path / "taken" / "x.json", "--out", tmp_path / "out")
    assert result.exit_code == EXIT_USER and "name another --json" in result.stderr


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_label_reaches_neither_terminal_nor_path(text: str, tmp_path: Path) -> None:
    def card(label: str, seed: int) -> Card:
        return make_card(label, seed=seed, n=8)

    write_card(tmp_path / "s" / "one", card(text, 0))
    write_card(tmp_path / "s" / "two", card("other", 1))
    before = {file for file in tmp_path.rglob("*") if "comparison" not in str(file)}
    result = run(tmp_path / "s" / "one", tmp_path / "s" / "two")
    assert result.exit_code == 0, result.output
    assert all(line.isprintable() for line in result.stdout.splitlines())
    made = set(tmp_path.rglob("*")) - before
    assert all(file.relative_to(tmp_path / "s").parts[0].startswith("comparison-") for file in made) and made
