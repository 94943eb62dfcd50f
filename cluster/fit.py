"""Whether a recipe can learn from a dataset: everything about it that can be known before anything starts."""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cluster.config import Recipe
from cluster.identity import SAME_MODEL, model_identity
from learner.dataset import GroupDataset, RowRef, read_rows, short
from raysteer.errors import ConfigError, DatasetError, UserError

_READERS = 8  # each holds a row group, about 4 MiB
_whole: set[tuple[str, int, int]] = set()  # path, size and time of files that this process has read to the last byte


def check_dataset(recipe: Recipe, folder: str | Path) -> GroupDataset:
    """A dataset that this recipe can learn from.

    Raises:
        DatasetError: there is none, it cannot be read, it was made with another model, or no group of it can be used.
        ConfigError: naming the key that its groups do not go with.
    """
    dataset = GroupDataset.open(folder)
    for error in misfits(dataset, recipe):
        raise error
    return dataset


def misfits(dataset: GroupDataset, recipe: Recipe) -> Iterator[UserError]:
    """Why this recipe cannot learn from a dataset, as far as it can be read; nothing when it can."""
    if not dataset.files:
        return
    yield from other_model(dataset, model_identity(recipe))
    if not dataset.rows:
        yield _no_group(dataset)
        return
    yield from _other_sizes(dataset, recipe)
    if len(dataset.rows) < recipe.run.groups_per_step:
        yield ConfigError(
            "run.groups_per_step",
            recipe.run.groups_per_step,
            f"{dataset.folder} has {len(dataset.rows)} to learn from{left_out(dataset)}: use that or less",
        )


def other_model(dataset: GroupDataset, mine: Mapping[str, Any]) -> Iterator[DatasetError]:
    """What of a dataset was made with another model than that of a recipe, whose identity is `mine`."""
    for key in SAME_MODEL:
        theirs = dataset.identity.get(key)
        if theirs == mine.get(key) or (key == "text_encoders" and key not in dataset.identity):
            continue
        yield DatasetError(
            str(dataset.folder),
            f"was made with another {key} ({short(theirs)}) than the recipe's ({short(mine.get(key))})",
            "use the recipe's model for both, or generate a dataset with it",
        )


def check_readable(dataset: GroupDataset) -> None:
    """Read every usable group of files that this process has not read yet: what is damaged would end a run half-way.
    About 0.2 GB/s a core, a file on each.

    Raises:
        DatasetError: naming file and row.
    """
    rows: defaultdict[int, list[int]] = defaultdict(list)
    for ref in dataset.rows:
        rows[ref.part].append(ref.row)

    def read(part: int) -> None:
        file = dataset.folder / dataset.files[part]
        seen = (str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns)
        if seen not in _whole:
            deque(read_rows(file, rows[part]), maxlen=0)
            _whole.add(seen)

    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as readers:
        deque(readers.map(read, sorted(rows)), maxlen=0)


def left_out(dataset: GroupDataset) -> str:
    """What of a dataset cannot be used, in brackets; "" when all can."""
    counts = ", ".join(f"{reason} {count}" for reason, count in sorted(dataset.skipped.items()) if count)
    return f" (left out: {counts})" if counts else ""


def _no_group(dataset: GroupDataset) -> DatasetError:
    problem = f"no group of it can be learned from{left_out(dataset)}" if dataset.skipped else "it holds no group"
    remedy = "generate groups whose images differ in reward: raysteer data shows what is there"
    return DatasetError(str(dataset.folder), problem, remedy)


def _other_sizes(dataset: GroupDataset, recipe: Recipe) -> Iterator[UserError]:
    """A batch is a matrix of rewards, and the plan counts with `sampling.group_size`: all groups are of that size."""

    def named(ref: RowRef) -> str:
        return f"ticket {ref.ticket} in {dataset.folder / dataset.files[ref.part]} has {ref.group_size} images"

    smallest, largest = (choose(dataset.rows, key=lambda ref: ref.group_size) for choose in (min, max))
    size, subset = recipe.sampling.group_size, getattr(recipe.objective, "subset", None)
    if smallest.group_size != largest.group_size:
        problem = f"its groups differ in size: {named(smallest)}, and ticket {largest.ticket} {largest.group_size}"
        yield DatasetError(str(dataset.folder), problem, "keep groups of one size in a folder of their own")
        return
    if subset is not None and subset > smallest.group_size:
        yield ConfigError("objective.subset", subset, f"{named(smallest)}: use that or less")
    if size != smallest.group_size:
        yield ConfigError("sampling.group_size", size, f"{named(smallest)}: set it to that")
