"""Group datasets: what is read is what was written, once a ticket, and whatever cannot be used is named."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.identity import model_identity
from cluster.journal import JournalWriter
from learner.dataset import GroupDataset
from raysteer.errors import DatasetError
from tests.conftest import RecipeFactory

SHAPE = (4, 4, 6, 6)
MODEL = {
    "family": "StableDiffusionPipeline",
    "denoiser": "a" * 64,
    "vae": "b" * 64,
    "text_encoders": "t" * 64,
    "resolution": 32,
}
IDENTITY = {
    "format": 1,
    "source": "train",
    "run": "made",
    "reward": "c" * 64,
    "sampling": {"steps": 4, "guidance_scale": 2.0, "deterministic": False},
    **MODEL,
}


def latents(ticket: int, size: int = 4) -> np.ndarray:
    return np.random.default_rng(ticket).standard_normal((size, *SHAPE[1:])).astype(np.float32)


def row(ticket: int, reward: list[float] | None = None, **changes: Any) -> dict[str, Any]:
    scores = np.arange(4, dtype=np.float32) + ticket if reward is None else np.array(reward, np.float32)
    return {
        "ticket": ticket,
        "prompt": f"prompt {ticket}",
        "prompt_class": "unsafe" if ticket % 2 else "safe",
        "category": "hate" if ticket % 2 else None,
        "truncated": False,
        "seeds": list(range(len(scores))),
        "step_seed": 1,
        "version": ticket // 2,
        "checksum": "abc",
        "sampler": "sampler-0",
        "reward_worker": "reward_worker-0",
        "reward": scores,
        "parts": {"alignment": scores / 10},
        "sample_s": 1.0,
        "score_s": 0.1,
        "scored_at": 12.0,
    } | changes


def write(folder: Path, *rows: dict[str, Any], identity: Mapping[str, Any] = IDENTITY, lost: bool = False) -> Path:
    """One more part of these rows; the path of it."""
    writer = JournalWriter(folder, identity)
    for one in rows:
        writer.append(one, None if lost else latents(one["ticket"], len(one["reward"])))
    writer.flush()
    return sorted(folder.glob("part-*.parquet"))[-1]


def without(file: Path, column: str) -> None:
    table = pq.read_table(file).drop_columns([column])
    pq.write_table(table.replace_schema_metadata({b"raysteer": json.dumps(IDENTITY).encode()}), file)


def test_what_was_written_comes_back_exactly_in_any_order(tmp_path: Path) -> None:
    write(tmp_path, row(3), row(0))
    write(tmp_path, row(1))
    dataset = GroupDataset.open(tmp_path)
    assert [(ref.ticket, ref.part, ref.row) for ref in dataset.rows] == [(0, 0, 1), (1, 1, 0), (3, 0, 0)]
    assert [ref.prompt_class for ref in dataset.rows] == ["safe", "unsafe", "unsafe"]
    assert dataset.identity == IDENTITY and not dataset.skipped and not dataset.problems
    for ref, group in zip(dataset.rows[::-1], dataset.read(dataset.rows[::-1]), strict=True):
        given = row(ref.ticket)
        assert (group.ticket, group.prompt, group.version) == (ref.ticket, given["prompt"], given["version"])
        assert (group.category, group.checksum, list(group.parts)) == (given["category"], "abc", ["alignment"])
        assert group.reward.dtype == group.final_latents.dtype == np.float32
        np.testing.assert_array_equal(group.reward, given["reward"])
        np.testing.assert_array_equal(group.parts["alignment"], given["parts"]["alignment"])
        np.testing.assert_array_equal(group.final_latents, latents(ref.ticket))


def test_a_run_folder_stands_for_its_journal(tmp_path: Path) -> None:
    write(tmp_path / "journal", row(0))
    assert [ref.ticket for ref in GroupDataset.open(tmp_path).rows] == [0]


def test_one_group_costs_one_row_group_and_opening_costs_no_latents(tmp_path: Path) -> None:
    big = np.zeros((4, 4, 256, 256), np.float32)  # 4 MiB: a row group of its own
    writer = JournalWriter(tmp_path, IDENTITY)
    for ticket in range(3):
        writer.append(row(ticket), big + ticket)
    writer.flush()
    file = tmp_path / "part-000001.parquet"
    assert pq.ParquetFile(file).num_row_groups == 3
    footer = pq.ParquetFile(file).metadata
    column = next(i for i in range(footer.num_columns) if footer.schema.column(i).path.startswith("final_latents"))
    data = bytearray(file.read_bytes())
    for group in (0, 2):  # the latents of the others may be anything
        chunk = footer.row_group(group).column(column)
        begin = chunk.dictionary_page_offset or chunk.data_page_offset
        data[begin : begin + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    file.write_bytes(data)
    dataset = GroupDataset.open(tmp_path)
    assert (dataset.read([dataset.rows[1]])[0].final_latents == 1).all()
    with pytest.raises(DatasetError, match=r"part-000001.parquet: row 2 cannot be read"):
        dataset.read([dataset.rows[2]])


def test_every_row_is_used_or_left_out_for_a_named_reason(tmp_path: Path) -> None:
    write(tmp_path, row(0), row(1), row(2, [0.5] * 4), row(3, [1.0, np.nan, 0.0, 2.0]))
    write(tmp_path, row(4, [1.0]))
    write(tmp_path, row(5), row(6), lost=True)
    write(tmp_path, row(1), row(6))
    dataset = GroupDataset.open(tmp_path)
    assert [(ref.ticket, ref.part) for ref in dataset.rows] == [(0, 0), (1, 3), (6, 3)], "the last one written"
    assert dataset.skipped == {
        "flat": 1,
        "reward_not_finite": 1,
        "single_image": 1,
        "latents_lost": 1,
        "duplicate": 2,
    }
    assert len(dataset.rows) + sum(dataset.skipped.values()) == 9
    found = {(problem.file, problem.row, problem.reason) for problem in dataset.problems}
    assert ("part-000003.parquet", 0, "latents_lost") in found
    assert {("part-000001.parquet", 1, "duplicate"), ("part-000003.parquet", 1, "duplicate")} <= found


def test_a_later_row_without_latents_does_not_cost_an_earlier_one(tmp_path: Path) -> None:
    write(tmp_path, row(0))
    write(tmp_path, row(0), lost=True)
    dataset = GroupDataset.open(tmp_path)
    assert [(ref.ticket, ref.part) for ref in dataset.rows] == [(0, 0)]
    assert dataset.skipped == {"duplicate": 1}


def test_a_folder_without_parts_is_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, said in ((".", "there is no dataset here"), ("nowhere", "no such folder"), ("file", "this is a file")):
        with pytest.raises(DatasetError, match=rf"{re.escape(str(tmp_path / name))}: .*{said}"):
            GroupDataset.open(tmp_path / name)


@pytest.mark.parametrize("column", ["reward", "final_latents", "ticket"])
def test_a_part_without_a_column_is_named(tmp_path: Path, column: str) -> None:
    write(tmp_path, row(0))
    without(write(tmp_path, row(1)), column)
    with pytest.raises(DatasetError, match=rf"part-000002.parquet: has no column {column}"):
        GroupDataset.open(tmp_path)


def test_latents_of_another_kind_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path, row(0))
    table = pq.read_table(file)
    index = table.schema.names.index("final_latents")
    kept = table.schema.metadata
    table = table.set_column(index, "final_latents", pa.array([[1.0, 2.0]])).replace_schema_metadata(kept)
    pq.write_table(table, file)
    with pytest.raises(DatasetError, match=r"its final_latents are list<.*fixed-shape float32 tensors"):
        GroupDataset.open(tmp_path)


def test_an_unreadable_part_is_named_or_with_strict_off_left_out(tmp_path: Path) -> None:
    write(tmp_path, row(0))
    torn = write(tmp_path, row(1))
    torn.write_bytes(torn.read_bytes()[:-100])
    with pytest.raises(DatasetError, match=r"part-000002.parquet: cannot be read \(.*generate the groups again"):
        GroupDataset.open(tmp_path)
    dataset = GroupDataset.open(tmp_path, strict=False)
    assert [ref.ticket for ref in dataset.rows] == [0] and dataset.files == ("part-000001.parquet",)
    assert [(p.file, p.row, p.reason) for p in dataset.problems] == [("part-000002.parquet", None, "unreadable")]


def test_no_flipped_byte_of_a_page_goes_unnoticed(tmp_path: Path) -> None:
    file = write(tmp_path, *(row(ticket) for ticket in range(4)))
    whole = file.read_bytes()
    expected = [group.final_latents for group in GroupDataset.open(tmp_path).read(GroupDataset.open(tmp_path).rows)]
    end = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")  # of the pages, where the footer begins
    for at in range(4, end, 97):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            dataset = GroupDataset.open(tmp_path)
            found = dataset.read(dataset.rows)
        except DatasetError as error:
            assert str(file) in str(error)
            continue
        for group, given in zip(
            found, expected, strict=True
        ):  # the byte was in a column nobody asks for, or a statistic
            np.testing.assert_array_equal(group.final_latents, given)
            np.testing.assert_array_equal(group.reward, row(group.ticket)["reward"])


def test_latents_that_are_not_numbers_are_named_with_their_row(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path, IDENTITY)
    writer.append(row(0), latents(0))
    broken = latents(1)
    broken[2, 0, 0, 0] = np.inf
    writer.append(row(1), broken)
    writer.flush()
    dataset = GroupDataset.open(tmp_path)
    assert len(dataset.read(dataset.rows[:1])) == 1
    with pytest.raises(DatasetError, match=r"part-000001.parquet: row 1: its latents are not finite numbers"):
        dataset.read(dataset.rows)


def test_rewards_and_latents_of_different_numbers_of_images_are_named_with_their_row(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path, IDENTITY)
    writer.append(row(0), latents(0))
    writer.append(row(1, [1.0, 2.0]), latents(1))
    writer.flush()
    with pytest.raises(DatasetError, match=r"part-000001.parquet: row 1: 2 rewards for 4 images of ticket 1"):
        GroupDataset.open(tmp_path)
    assert GroupDataset.open(tmp_path, strict=False).skipped == {"corrupt": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "does not say which model it was made with"),
        (b"{not json", "its identity is no JSON object"),
        (b"[1]", "its identity is no JSON object"),
        (b'{"format": 2}', "has format 2, this version reads 1"),
    ],
)
def test_a_part_without_a_readable_identity_is_named(tmp_path: Path, text: bytes | None, said: str) -> None:
    file = write(tmp_path, row(0))
    pq.write_table(pq.read_table(file).replace_schema_metadata(None if text is None else {b"raysteer": text}), file)
    with pytest.raises(DatasetError, match=rf"part-000001.parquet: .*{said}"):
        GroupDataset.open(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("denoiser", "d" * 64), ("reward", "d" * 64), ("source", "generate")])
def test_parts_of_different_origin_are_not_one_dataset(tmp_path: Path, key: str, value: str) -> None:
    write(tmp_path, row(0))
    write(tmp_path, row(1), identity=IDENTITY | {"run": "renamed"})
    assert len(GroupDataset.open(tmp_path).rows) == 2, "a run's name is for people"
    write(tmp_path, row(2), identity=IDENTITY | {key: value})
    said = rf"part-000003.parquet: was made with another {key} \({value[:12]}\) than part-000001.parquet \("
    with pytest.raises(DatasetError, match=said):
        GroupDataset.open(tmp_path)


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("reward", pa.array([["a", "b"]]), "column reward is list<.*string>, not lists of float32"),
        ("reward.alignment", pa.array([1.0]), "column reward.alignment is double, not lists of float32"),
        ("prompt", pa.array([1]), "column prompt is int64, not text"),
        ("ticket", pa.array(["0"]), "column ticket is string, not whole numbers"),
    ],
)
def test_a_column_of_another_type_is_named(tmp_path: Path, column: str, values: pa.Array, said: str) -> None:
    file = write(tmp_path, row(0))
    table = pq.read_table(file)
    pq.write_table(table.set_column(table.schema.names.index(column), column, values), file)
    with pytest.raises(DatasetError, match=rf"part-000001.parquet: its {said}"):
        GroupDataset.open(tmp_path)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_parts_of_a_version_that_wrote_no_text_encoders_go_with_all_and_the_others_only_with_each_other(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    older = {key: value for key, value in IDENTITY.items() if key != "text_encoders"}
    origins = [older, IDENTITY, older]
    for number in order:
        write(tmp_path, row(number), identity=origins[number])
    dataset = GroupDataset.open(tmp_path)
    assert len(dataset.rows) == 3 and dataset.identity == IDENTITY
    write(tmp_path, row(3), identity=IDENTITY | {"text_encoders": "u" * 64})
    said = r"part-000004.parquet: was made with another text_encoders \(u{12}\) than part-000002.parquet \(t{12}\)"
    with pytest.raises(DatasetError, match=said):
        GroupDataset.open(tmp_path)


def test_a_hub_name_that_is_not_here_stands_for_itself(tiny_recipe: RecipeFactory) -> None:
    from cluster.config import load_recipe

    mine = model_identity(load_recipe(tiny_recipe({"model.path": "nobody/nothing", "model.revision": "v2"})))
    assert (mine["denoiser"], mine["vae"]) == ("nobody/nothing/denoiser@v2", "nobody/nothing/vae@v2")
    assert mine["text_encoders"] == "nobody/nothing/text_encoders@v2"


def test_latents_that_are_missing_in_a_row_are_named(tmp_path: Path) -> None:
    file = write(tmp_path, row(0), row(1))
    table = pq.read_table(file)
    index, column = table.schema.names.index("final_latents"), table["final_latents"].combine_chunks()
    gone = pa.ExtensionArray.from_storage(column.type, pa.array([column.storage[0].as_py(), None], column.storage.type))
    pq.write_table(table.set_column(index, "final_latents", gone), file)
    dataset = GroupDataset.open(tmp_path)
    with pytest.raises(DatasetError, match=r"part-000001.parquet: rows 0 to 1 cannot be read"):
        dataset.read(dataset.rows)


def test_a_models_identity_is_its_content_and_not_its_place(
    tiny_recipe: RecipeFactory, tmp_path: Path, tiny_pipeline: Path
) -> None:
    import shutil

    from cluster.config import load_recipe

    def of(path: Path) -> dict[str, Any]:
        return model_identity(load_recipe(tiny_recipe({"model.path": str(path)})))

    moved = shutil.copytree(tiny_pipeline, tmp_path / "moved")
    assert of(moved) == of(tiny_pipeline)
    (moved / "tokenizer" / "note.txt").write_text("neither denoiser nor VAE nor text encoder")
    assert of(moved) == of(tiny_pipeline)
    for part, key in (("vae", "vae"), ("text_encoder", "text_encoders"), ("unet", "denoiser")):
        before = of(moved)
        weights = next((moved / part).glob("*.safetensors"))
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        after = of(moved)
        assert {name for name in after if after[name] != before[name]} == {key}
