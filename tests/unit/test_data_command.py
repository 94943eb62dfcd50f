"""``raysteer data``: what a dataset holds, what is wrong with it, and whether it fits, as text, JSON and picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cluster.cli import app
from cluster.cli_shell import EXIT_BAD_DATA, EXIT_USER
from cluster.config import load_recipe
from cluster.data import examine, figures
from cluster.identity import model_identity
from cluster.journal import JournalWriter
from tests.conftest import RecipeFactory
from tests.unit.test_dataset import IDENTITY, latents, row, write
from tests.unit.test_hostile import HOSTILE


def run(folder: Path, *options: str) -> Any:
    return CliRunner().invoke(app, ["data", str(folder), *options])


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Six groups in two parts, one of them flat and one written again."""
    write(tmp_path / "set", *(row(ticket) for ticket in range(4)))
    write(tmp_path / "set", row(4), row(5, [1.0] * 4), row(0))
    return tmp_path / "set"


def test_figures_are_those_of_the_usable_groups(dataset: Path) -> None:
    report = examine(dataset)
    used = [0, 1, 2, 3, 4]
    assert report.good and [group.ticket for group in report.groups] == used
    rewards = np.array([np.arange(4) + ticket for ticket in used])
    told = report.as_json()
    assert (told["groups"], told["images"], told["prompts"], told["adapters"]) == (5, 20, 5, 1)
    assert told["all"]["reward_mean"] == pytest.approx(rewards.mean())
    assert told["all"]["reward_std"] == pytest.approx(rewards.std())
    assert told["all"]["std_in_groups"] == pytest.approx(np.arange(4).std())
    assert told["all"]["parts"] == {"alignment": pytest.approx(rewards.mean() / 10)}
    assert {name: of["groups"] for name, of in told["classes"].items()} == {"safe": 3, "unsafe": 2}
    assert told["classes"]["unsafe"]["reward_mean"] == pytest.approx(rewards[[1, 3]].mean())
    assert [(of["version"], of["groups"]) for of in told["versions"]] == [(0, 2), (1, 2), (2, 1)]
    assert told["lag"] == {"mean": pytest.approx(1.2), "max": 2.0}
    assert told["latents"] == [{"shape": [4, 4, 6, 6], "groups": 5}]
    assert told["skipped"] == {"duplicate": 1, "flat": 1} and not told["copies"]
    assert told["bytes"] == sum(file.stat().st_size for file in dataset.iterdir())
    assert figures([])["reward_mean"] is None


def test_the_command_prints_writes_and_draws(dataset: Path, tmp_path: Path) -> None:
    figures_file, picture = tmp_path / "found.json", tmp_path / "new" / "found.png"
    result = run(dataset, "--json", str(figures_file), "--plot", str(picture))
    assert result.exit_code == 0, result.output
    for said in (
        "5 groups, 20 images, 5 prompts in 2 files",
        "raysteer train made",
        "duplicate 1, flat 1",
        "unsafe",
        "60 %",
    ):
        assert said in result.output
    assert json.loads(figures_file.read_text()) == json.loads(json.dumps(examine(dataset).as_json()))
    with Image.open(picture) as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(10**6) or []) > 20


def test_every_damage_is_named_with_file_and_row_and_the_exit_code_is_1(dataset: Path, tmp_path: Path) -> None:
    writer = JournalWriter(dataset, IDENTITY)
    broken = latents(9)
    broken[0, 0, 0, 0] = np.nan
    writer.append(row(8), latents(8))
    writer.append(row(9), broken)
    writer.flush()
    torn = write(dataset, row(10))
    torn.write_bytes(torn.read_bytes()[:50])
    write(dataset, row(11), identity=IDENTITY | {"denoiser": "d" * 64})
    result = run(dataset, "--json", str(tmp_path / "found.json"))
    assert result.exit_code == EXIT_BAD_DATA
    assert "part-000003.parquet, row 1: its latents are not" in result.output
    assert "part-000004.parquet: cannot be read" in result.output
    assert "part-000005.parquet: was made with another denoiser (dddddddddddd)" in result.output
    told = json.loads((tmp_path / "found.json").read_text())
    damaged = {(p["file"], p["row"]) for p in told["problems"] if p["reason"] in ("corrupt", "unreadable")}
    assert damaged == {("part-000003.parquet", 1), ("part-000004.parquet", None), ("part-000005.parquet", None)}
    assert not told["good"] and told["groups"] == 6, "what is whole is described all the same"


def test_a_dataset_of_nothing_but_damage_is_still_described(tmp_path: Path) -> None:
    file = write(tmp_path, row(0))
    file.write_bytes(b"PAR1 is not enough")
    result = run(tmp_path, "--plot", str(tmp_path / "empty.png"))
    assert result.exit_code == EXIT_BAD_DATA and "0 groups" in result.output
    assert (tmp_path / "empty.png").is_file()


def test_different_tickets_with_the_same_latents_are_shown(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path, IDENTITY)
    for ticket, content in ((0, 0), (1, 1), (2, 0)):
        writer.append(row(ticket), latents(content))
    writer.flush()
    report = examine(tmp_path)
    assert report.copies == ((0, 2),) and report.good
    assert "tickets 0, 2 have identical latents" in run(tmp_path).output


def test_whether_it_fits_a_recipe_decides_the_exit_code(tmp_path: Path, tiny_recipe: RecipeFactory) -> None:
    file = tiny_recipe({"sampling.group_size": 4, "objective": {"name": "gdro"}, "run.groups_per_step": 2})
    recipe = load_recipe(file)
    mine = IDENTITY | model_identity(recipe)
    write(tmp_path / "ours", row(0), row(1), identity=mine)
    write(tmp_path / "theirs", row(0), identity=mine | {"vae": "f" * 64})
    assert run(tmp_path / "ours", "--recipe", str(file)).exit_code == 0
    result = run(tmp_path / "theirs", "--recipe", str(file))
    assert result.exit_code == EXIT_BAD_DATA
    assert "does not fit" in result.output and "was made with another vae (ffffffffffff)" in result.output
    assert "has 1 to learn from: use that or less" in result.output, "all that is wrong is said at once"


def test_no_dataset_and_no_recipe_are_one_line_each(tmp_path: Path, tiny_recipe: RecipeFactory) -> None:
    for arguments in ((tmp_path,), (tmp_path, "--recipe", str(tmp_path / "none.yaml"))):
        result = run(*arguments)
        assert result.exit_code == EXIT_USER and len(result.stderr.splitlines()) == 1 and not result.stdout


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_prompts_and_classes_are_text_everywhere(tmp_path: Path, text: str) -> None:
    hostile = [row(ticket, prompt=text, prompt_class=text, category=text) for ticket in range(2)]
    write(tmp_path, *hostile, identity=IDENTITY | {"run": text, "family": text})
    result = run(tmp_path, "--json", str(tmp_path / "found.json"), "--plot", str(tmp_path / "found.png"))
    assert result.exit_code == 0, result.output
    assert all(character.isprintable() or character == "\n" for character in result.output)
    assert json.loads((tmp_path / "found.json").read_text())["classes"].keys() == {text}
    assert {group.prompt for group in examine(tmp_path).groups} == {text}
