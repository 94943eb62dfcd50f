"""Bad datasets, through the real command line: what becomes of each before anything starts (docs/data.md)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.cli_shell import EXIT_BAD_DATA, EXIT_USER
from cluster.config import load_recipe
from cluster.identity import model_identity
from cluster.journal import JournalWriter
from learner.checkpoint import Checkpoint, save_checkpoint
from learner.dataset import GroupDataset
from tests.conftest import RecipeFactory
from tests.unit.test_bad_input import tree
from tests.unit.test_dataset import IDENTITY, latents, row, without, write

GDRO = {"objective": {"name": "gdro"}, "sampling.group_size": 4, "run.groups_per_step": 2}
GOOD = (row(0), row(1))
ONE, FLAT, NAN = [1.0], [0.5] * 4, [1.0, np.nan, 0.0, 2.0]


@dataclass(frozen=True)
class Case:
    """A dataset, and what is said of it.

    Attributes:
        make: writes it into a folder; its second argument is an identity that fits the recipe.
        train: parts of the one line with which ``raysteer train`` refuses it; empty: it can be learned from.
        data: parts of what ``raysteer data --recipe`` prints.
        code: exit code of ``raysteer data --recipe``.
        changes: of the recipe.
    """

    make: Callable[[Path, dict[str, Any]], Any]
    train: tuple[str, ...]
    data: tuple[str, ...]
    code: int
    changes: dict[str, Any] = field(default_factory=dict)


def holding(*rows: dict[str, Any], **changed: Any) -> Callable[[Path, dict[str, Any]], None]:
    """A dataset of these rows, whose identity has changed so."""
    return lambda folder, mine: (write(folder, *rows, identity=mine | changed), None)[1]


def lacking(column: str) -> Callable[[Path, dict[str, Any]], None]:
    def make(folder: Path, mine: dict[str, Any]) -> None:
        write(folder, *GOOD, identity=mine)
        without(write(folder, row(2), identity=mine), column)

    return make


def typed(folder: Path, mine: dict[str, Any]) -> None:
    """Its prompts are numbers."""
    file = write(folder, *GOOD, identity=mine)
    table = pq.read_table(file)
    pq.write_table(table.set_column(table.schema.names.index("prompt"), "prompt", pa.array([1, 2])), file)


def torn(folder: Path, mine: dict[str, Any]) -> None:
    write(folder, *GOOD, identity=mine)
    file = write(folder, row(2), row(3), identity=mine)
    file.write_bytes(file.read_bytes()[:-100])


def rotten_latents(folder: Path, mine: dict[str, Any]) -> None:
    write(folder, *GOOD, identity=mine)
    file = write(folder, row(2), identity=mine)
    file.write_bytes(rotten(file))


def rotten(file: Path) -> bytes:
    """The content of a part, but for one bit of its first latents."""
    group, data = pq.ParquetFile(file).metadata.row_group(0), bytearray(file.read_bytes())
    columns = (group.column(number) for number in range(group.num_columns))
    chunk = next(column for column in columns if column.path_in_schema.startswith("final_latents"))
    begin = chunk.dictionary_page_offset or chunk.data_page_offset
    data[begin + chunk.total_compressed_size - 10] ^= 1
    return bytes(data)


def not_numbers(folder: Path, mine: dict[str, Any]) -> None:
    writer = JournalWriter(folder, mine)
    broken = latents(2)
    broken[0, 0, 0, 0] = np.inf
    for ticket, values in ((0, latents(0)), (1, latents(1)), (2, broken)):
        writer.append(row(ticket), values)
    writer.flush()


def too_few_rewards(folder: Path, mine: dict[str, Any]) -> None:
    write(folder, *GOOD, identity=mine)
    writer = JournalWriter(folder, mine)
    writer.append(row(2), latents(2))
    writer.append(row(3, [1.0, 2.0]), latents(3))
    writer.flush()


def no_row(folder: Path, mine: dict[str, Any]) -> None:
    file = write(folder, row(0), identity=mine)
    pq.write_table(pq.read_table(file).slice(0, 0), file)


def nothing(folder: Path, mine: dict[str, Any]) -> None:
    folder.mkdir(parents=True)


ANOTHER = "x" * 64
CASES = {
    "one image": Case(holding(*GOOD, row(2, ONE)), (), ("left out    single_image 1",), 0),
    "all equal": Case(holding(*GOOD, row(2, FLAT)), (), ("left out    flat 1",), 0),
    "reward is NaN": Case(holding(*GOOD, row(2, NAN)), (), ("left out    reward_not_finite 1",), 0),
    "too few groups": Case(
        holding(row(0), row(1, FLAT)),
        ("run.groups_per_step: 2 cannot be used", "has 1 to learn from (left out: flat 1): use that or less"),
        ("does not fit", "has 1 to learn from"),
        EXIT_BAD_DATA,
    ),
    "every group left out": Case(
        holding(row(0, FLAT), row(1, FLAT), row(2, NAN)),
        ("no group of it can be learned from (left out: flat 2, reward_not_finite 1)", "raysteer data"),
        ("does not fit", "no group of it can be learned from"),
        EXIT_BAD_DATA,
    ),
    "no row": Case(
        no_row, ("it holds no group; generate groups",), ("does not fit", "it holds no group"), EXIT_BAD_DATA
    ),
    "no reward column": Case(
        lacking("reward"), ("part-000002.parquet: has no column reward",), ("has no column reward",), EXIT_BAD_DATA
    ),
    "a column of another type": Case(
        typed, ("part-000001.parquet: its column prompt is int64, not text",), ("not text",), EXIT_BAD_DATA
    ),
    "subset above group": Case(
        holding(*GOOD),
        ("objective.subset: 6 cannot be used; ticket 0 in ", "part-000001.parquet has 4 images: use that or less"),
        ("does not fit", "objective.subset"),
        EXIT_BAD_DATA,
        {"objective": {"name": "gdro", "subset": 6}, "sampling.group_size": 8},
    ),
    "groups of another size": Case(
        holding(*GOOD),
        ("sampling.group_size: 8 cannot be used; ticket 0 in ", "has 4 images: set it to that"),
        ("does not fit", "sampling.group_size"),
        EXIT_BAD_DATA,
        {"sampling.group_size": 8},
    ),
    "groups of several sizes": Case(
        lambda folder, mine: [holding(row(0), row(1))(folder, mine), holding(row(7, [0.0, 1.0, 2.0]))(folder, mine)],
        (
            "its groups differ in size: ticket 7 in ",
            "part-000002.parquet has 3 images, and ticket 0 4",
        ),
        ("does not fit", "differ in size"),
        EXIT_BAD_DATA,
    ),
    **{
        f"another {key}": Case(
            holding(*GOOD, **{key: ANOTHER}),
            (f"was made with another {key} (xxxxxxxxxxxx) than the recipe's (", "generate a dataset with it"),
            ("does not fit", f"another {key}"),
            EXIT_BAD_DATA,
        )
        for key in ("family", "denoiser", "vae", "text_encoders")
    },
    "another resolution": Case(
        holding(*GOOD, resolution=64),
        ("was made with another resolution (64) than the recipe's (32)",),
        ("does not fit",),
        EXIT_BAD_DATA,
    ),
    "two origins": Case(
        lambda folder, mine: [holding(*GOOD)(folder, mine), holding(row(2), reward=ANOTHER)(folder, mine)],
        ("part-000002.parquet: was made with another reward (xxxxxxxxxxxx) than part-000001.parquet",),
        ("another reward",),
        EXIT_BAD_DATA,
    ),
    "torn file": Case(
        torn, ("part-000002.parquet: cannot be read (", "restore the file"), ("part-000002.parquet",), EXIT_BAD_DATA
    ),
    "rotten latents": Case(
        rotten_latents, ("part-000002.parquet: row 0 cannot be read (",), ("part-000002.parquet, row 0",), EXIT_BAD_DATA
    ),
    "latents are not numbers": Case(
        not_numbers,
        ("part-000001.parquet: row 2: its latents are not finite numbers",),
        ("part-000001.parquet, row 2: its latents are not finite numbers",),
        EXIT_BAD_DATA,
    ),
    "rewards of fewer images": Case(
        too_few_rewards,
        ("part-000002.parquet: row 1: 2 rewards for 4 images of ticket 3",),
        ("part-000002.parquet, row 1: 2 rewards for 4 images",),
        EXIT_BAD_DATA,
    ),
    "empty folder": Case(nothing, ("offline.data ", "there is no dataset here (no part-*.parquet)"), (), EXIT_USER),
    "no folder": Case(lambda folder, mine: None, ("offline.data ", "there is no such folder"), (), EXIT_USER),
    "a file": Case(lambda folder, mine: folder.touch(), ("offline.data ", "this is a file"), (), EXIT_USER),
}


def invoke(*arguments: str) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def started() -> tuple[bool, set[psutil.Process]]:
    """What this process has started: whether Ray, and its own children (whose children come and go)."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized(), set(psutil.Process().children())


@pytest.fixture
def recipe(tiny_recipe: RecipeFactory, tmp_path: Path) -> RecipeFactory:
    """The recipe of a learner on the dataset ``set``, which need not be there yet."""
    return lambda changes=None: tiny_recipe(GDRO | {"offline": {"data": str(tmp_path / "set")}} | (changes or {}))


@pytest.fixture
def mine(tiny_recipe: RecipeFactory) -> dict[str, Any]:
    """The identity of a dataset that this recipe's model has drawn."""
    return IDENTITY | model_identity(load_recipe(tiny_recipe()))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_bad_dataset_is_refused_by_name_or_learned_from_without_what_is_bad(
    case: Case, recipe: RecipeFactory, mine: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    case.make(folder, mine)
    file = str(recipe(case.changes))
    before = tree(tmp_path), started()
    if case.train:
        result = invoke("train", file)
        assert result.exit_code == EXIT_USER, result.output
        assert result.stdout == "" and len(result.stderr.splitlines()) == 1
        for said in case.train:
            assert said in result.stderr
        assert invoke("plan", file).stderr == result.stderr, "the plan knows it too"
    else:
        assert invoke("plan", file).exit_code == 0
    shown = invoke("data", str(folder), "--recipe", file)
    assert shown.exit_code == case.code, shown.output
    for said in case.data:
        assert said in shown.output
    assert (tree(tmp_path), started()) == before


def test_a_dataset_that_is_damaged_later_costs_no_checkpoint_and_restored_it_is_gone_on_with(
    recipe: RecipeFactory, mine: dict[str, Any], tmp_path: Path
) -> None:
    part = write(tmp_path / "set", *GOOD, identity=mine)
    whole, file = part.read_bytes(), recipe()
    loaded = load_recipe(file)
    state = {"w": np.zeros(1, np.float32)}
    save_checkpoint(loaded.run_dir / "checkpoints", Checkpoint(1, loaded.fingerprint(), state, state, {}))
    assert invoke("plan", str(file)).exit_code == 0
    part.write_bytes(whole[: len(whole) // 2])
    before = tree(tmp_path)
    refused = invoke("train", str(file))
    assert refused.exit_code == EXIT_USER and "part-000001.parquet: cannot be read" in refused.stderr
    assert tree(tmp_path) == before
    part.write_bytes(whole)
    assert invoke("plan", str(file)).exit_code == 0
    write(tmp_path / "set", row(2), identity=mine)
    changed = invoke("train", str(file))
    assert changed.exit_code == EXIT_USER and "a file it names has changed" in changed.stderr


def test_parts_without_text_encoders_are_of_an_earlier_version_and_go_with_every_model(
    recipe: RecipeFactory, mine: dict[str, Any], tmp_path: Path
) -> None:
    older = {key: value for key, value in mine.items() if key != "text_encoders"}
    write(tmp_path / "set", *GOOD, identity=older)
    assert invoke("plan", str(recipe())).exit_code == 0
    assert "text_encoders" not in GroupDataset.open(tmp_path / "set").identity
    write(tmp_path / "set", row(2), identity=mine | {"text_encoders": ANOTHER})
    refused = invoke("train", str(recipe()))
    assert refused.exit_code == EXIT_USER and "another text_encoders (xxxxxxxxxxxx)" in refused.stderr
