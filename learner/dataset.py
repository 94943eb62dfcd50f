"""Group datasets: folders of Parquet parts with scored groups and their final latents, written by `cluster.journal`.

The journal of a run and the output of `raysteer generate` are the same thing. Each part says in its schema metadata,
under the key `raysteer`, what it was made with (JSON):

    format 1 · source "train" or "generate" · run: its name · family: pipeline class · denoiser, vae: sha256 of their
    folders · text_encoders: sha256 of all of theirs · reward: sha256 of its settings · sampling: {steps,
    guidance_scale, deterministic} · resolution: pixels

Opening a dataset reads footers, tickets, classes and rewards, never latents; `read` reads the row groups it needs, and
every page it reads has to have the checksum it was written with. Pure: no Ray.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raysteer.errors import DatasetError

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
IDENTITY_KEY = b"raysteer"
PARTS = "part-*.parquet"
REWARD, LATENTS = "reward", "final_latents"
_LATER = ("text_encoders",)  # keys that parts of earlier versions lack: what is missing is not compared
_SMALL = ("ticket", "prompt_class", REWARD)
_LARGE = ("prompt", "category", "version", "checksum", LATENTS)
_AGAIN = "restore the file, or delete it and generate the groups again"


@dataclass(frozen=True)
class RowRef:
    """Where a usable group is: the number of its part (in `GroupDataset.files`), its row there, and what it is."""

    part: int
    row: int
    ticket: int
    prompt_class: str
    group_size: int


@dataclass(frozen=True)
class Problem:
    """A row that is left out, or a file (`row` None) that cannot be used. `file` is a name in the dataset's folder."""

    file: str
    row: int | None
    reason: str
    detail: str

    def __str__(self) -> str:
        where = self.file if self.row is None else f"{self.file}, row {self.row}"
        return f"{where}: {self.detail}"


@dataclass(frozen=True)
class OfflineGroup:
    """One group as it was scored. `reward` and each of `parts`: float32 [G]; `final_latents`: float32 [G, C, h, w] in
    the model's scaled latent space.
    """

    ticket: int
    prompt: str
    prompt_class: str
    category: str | None
    version: int
    checksum: str
    reward: np.ndarray
    parts: Mapping[str, np.ndarray]
    final_latents: np.ndarray


@dataclass(frozen=True)
class GroupDataset:
    """An opened dataset.

    Attributes:
        folder: of the parts.
        files: names of the parts that can be used.
        identity: what all of them were made with.
        rows: the usable groups in ticket order, one per ticket: the last usable row that was written.
        skipped: rows left out, by reason: "duplicate" (its ticket has another row), "single_image", "flat" (all rewards
        equal), "reward_not_finite", "latents_lost"; with `strict` off also "corrupt".
        problems: every row left out; with `strict` off also every file.
        rewards: float32 [G] of each of the rows.
    """

    folder: Path
    files: tuple[str, ...]
    identity: dict[str, Any]
    rows: tuple[RowRef, ...]
    skipped: dict[str, int]
    problems: tuple[Problem, ...]
    rewards: tuple[np.ndarray, ...] = field(repr=False, compare=False)

    @classmethod
    def open(cls, folder: str | Path, strict: bool = True) -> GroupDataset:
        """Open the dataset in `folder`, or in the `journal` of a run folder.

        Args:
            strict: refuse a dataset of which a file or a row cannot be read; otherwise these become problems.

        Raises:
            DatasetError: no dataset is there; naming the file: it cannot be read, lacks a column or its identity, or
                was made with something else than the others.
        """
        place = find_dataset(folder)
        parts: list[_Part] = []
        known: dict[str, tuple[Any, str]] = {}  # of the identity: each value, and the part that had it first
        problems: list[Problem] = []
        for file in sorted(place.glob(PARTS)):
            try:
                part = _Part(file)
                if parts:
                    _check_same(known, part)
            except DatasetError as error:
                if strict:
                    raise
                problems.append(Problem(file.name, None, "unreadable", f"{error.problem}; {error.remedy}"))
                continue
            corrupt = [row.problem(file.name) for row in part.rows if row.reason == "corrupt"]
            if corrupt and strict:
                raise DatasetError(str(file), f"row {corrupt[0].row}: {corrupt[0].detail}", _AGAIN)
            parts.append(part)
            known = {key: (value, file.name) for key, value in part.identity.items()} | known
        rows, rewards, left_out = _choose(parts)
        return cls(
            folder=place,
            files=tuple(part.file.name for part in parts),
            identity={key: value for key, (value, _) in known.items()},
            rows=rows,
            skipped=dict(Counter(problem.reason for problem in left_out)),
            problems=(*problems, *left_out),
            rewards=rewards,
        )

    def read(self, refs: Sequence[RowRef]) -> list[OfflineGroup]:
        """These groups, in this order.

        Raises:
            DatasetError: naming file and rows: they cannot be read any more, or their latents are not numbers.
        """
        wanted: defaultdict[int, set[int]] = defaultdict(set)
        for ref in refs:
            wanted[ref.part].add(ref.row)
        found: dict[tuple[int, int], OfflineGroup] = {}
        for part, rows in sorted(wanted.items()):
            for row, group in read_rows(self.folder / self.files[part], rows):
                found[part, row] = group
        return [found[ref.part, ref.row] for ref in refs]


def find_dataset(folder: str | Path, key: str = "") -> Path:
    """The folder of the parts: `folder` itself, or the `journal` in it. `key`: of the recipe, if it comes from one.

    Raises:
        DatasetError: there is no part.
    """
    for place in (Path(folder), Path(folder) / "journal"):
        if next(place.glob(PARTS), None) is not None:
            return place
    problem = "there is no dataset here (no part-*.parquet)"
    if not Path(folder).is_dir():
        problem = "this is a file, and a dataset is a folder" if Path(folder).exists() else "there is no such folder"
    raise DatasetError(f"{key} {folder}".lstrip(), problem, "give the folder of a raysteer generate or train")


def short(value: Any) -> str:
    """A value of an identity for people: of a hash its beginning."""
    text = str(value)
    return text[:12] if len(text) == 64 else text


# -- one part ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """A row as the small columns show it. `reason`: why it cannot be used, "" if it can."""

    row: int
    ticket: int
    prompt_class: str
    reward: np.ndarray
    reason: str
    detail: str

    @property
    def group_size(self) -> int:
        return len(self.reward)

    def problem(self, file: str) -> Problem:
        return Problem(file, self.row, self.reason, self.detail)


class _Part:
    """Footer and small columns of one file. Raises DatasetError when it is no part of a dataset."""

    def __init__(self, file: Path) -> None:
        import pyarrow.parquet as pq

        self.file = file
        with _reading(file), pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            schema = parquet.schema_arrow
            self.identity = _identity_of(file, (schema.metadata or {}).get(IDENTITY_KEY))
            for name in (*_SMALL, *_LARGE):
                if name not in schema.names:
                    raise DatasetError(str(file), f"has no column {name}", "it is no journal: take it out")
            _check_types(file, schema)
            images = _images_in(file, schema.field(LATENTS).type)
            columns = parquet.read(columns=list(_SMALL)).to_pydict()
        values = zip(columns["ticket"], columns["prompt_class"], columns[REWARD], strict=True)
        self.rows = [_judge(row, *value, images) for row, value in enumerate(values)]


@contextmanager
def _reading(file: Path, what: str = "") -> Iterator[None]:
    """Whatever goes wrong inside, the DatasetError names the file, and `what` of it."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise DatasetError(str(file), f"{what} cannot be read ({said})".strip(), _AGAIN) from error


def _identity_of(file: Path, text: bytes | None) -> dict[str, Any]:
    if text is None:
        raise DatasetError(
            str(file), "does not say which model it was made with", "generate it again: it is of an earlier version"
        )
    try:
        identity = dict(json.loads(text))
    except (ValueError, TypeError):
        raise DatasetError(str(file), "cannot be read (its identity is no JSON object)", _AGAIN) from None
    if identity.get("format") != FORMAT:
        raise DatasetError(
            str(file),
            f"has format {identity.get('format')!r}, this version reads {FORMAT}",
            "use the version of raysteer that wrote it",
        )
    return identity


def _images_in(file: Path, kind: pa.DataType) -> int | None:
    """Images of a group by the type of the latents' column; None when the latents of this part are lost."""
    import pyarrow as pa

    if pa.types.is_null(kind):
        return None
    if not isinstance(kind, pa.FixedShapeTensorType) or len(kind.shape) != 4 or kind.value_type != pa.float32():
        raise DatasetError(
            str(file), f"its {LATENTS} are {kind}", "they must be fixed-shape float32 tensors [G, C, h, w]"
        )
    return int(kind.shape[0])


def _check_types(file: Path, schema: pa.Schema) -> None:
    """Refuse columns of other types than the journal's: what is in them would be found out in the middle of a run."""
    import pyarrow.types as types

    def text(kind: pa.DataType) -> bool:
        return bool(types.is_string(kind) or types.is_large_string(kind))

    def scores(kind: pa.DataType) -> bool:
        return bool((types.is_list(kind) or types.is_large_list(kind)) and types.is_floating(kind.value_type))

    wanted: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
        **dict.fromkeys(("ticket", "version"), (types.is_integer, "whole numbers")),
        **dict.fromkeys(("prompt", "prompt_class", "checksum"), (text, "text")),
        "category": (lambda kind: text(kind) or types.is_null(kind), "text"),
        **{name: (scores, "lists of float32") for name in schema.names if name.split(".")[0] == REWARD},
    }
    for name, (fits, words) in wanted.items():
        if not fits(schema.field(name).type):
            problem = f"its column {name} is {schema.field(name).type}, not {words}"
            raise DatasetError(str(file), problem, "it is no journal: take it out")


def _check_same(known: Mapping[str, tuple[Any, str]], part: _Part) -> None:
    for key in sorted((known.keys() | part.identity.keys()) - {"run"}):
        if key in _LATER and (key not in known or key not in part.identity):
            continue
        (ours, first), theirs = known.get(key, (None, "the parts before it")), part.identity.get(key)
        if ours != theirs:
            raise DatasetError(
                str(part.file),
                f"was made with another {key} ({short(theirs)}) than {first} ({short(ours)})",
                "keep groups of different origin in folders of their own",
            )


def _judge(row: int, ticket: Any, prompt_class: Any, reward: Any, images: int | None) -> _Row:
    """What a row is good for. `images`: of its latents, None when these are lost."""
    size = len(reward or ())
    if ticket is None or prompt_class is None or not size or None in reward or images not in (None, size):
        detail = f"{size} rewards for {images} images of ticket {ticket}"
        if ticket is None or prompt_class is None:
            detail = f"it has no {'ticket' if ticket is None else 'prompt_class'}"
        elif size and None in reward:
            detail = f"a reward of ticket {ticket} is missing"
        number = -1 if ticket is None else ticket
        return _Row(row, number, str(prompt_class), np.empty(0, np.float32), "corrupt", detail)
    scores, reason, detail = np.array(reward, np.float32), "", ""
    if images is None:
        reason, detail = "latents_lost", f"the latents of ticket {ticket} died with their sampler"
    elif size == 1:
        reason, detail = "single_image", f"ticket {ticket} has one image: nothing to compare it with"
    elif not np.isfinite(scores).all():
        reason, detail = "reward_not_finite", f"a reward of ticket {ticket} is not a number"
    elif scores.min() == scores.max():
        reason, detail = "flat", f"all {size} rewards of ticket {ticket} are {scores[0]:g}"
    return _Row(row, ticket, prompt_class, scores, reason, detail)


def _choose(parts: Sequence[_Part]) -> tuple[tuple[RowRef, ...], tuple[np.ndarray, ...], list[Problem]]:
    """For each ticket its last usable row, in ticket order, and their rewards; and whatever is left out, with the
    reason.
    """
    chosen: list[RowRef] = []
    rewards: list[np.ndarray] = []
    left_out: list[Problem] = []
    by_ticket: defaultdict[int, list[tuple[int, _Row]]] = defaultdict(list)
    for number, part in enumerate(parts):
        for row in part.rows:
            if row.reason == "corrupt":
                left_out.append(row.problem(part.file.name))
            else:
                by_ticket[row.ticket].append((number, row))
    for ticket, written in sorted(by_ticket.items()):
        number, row = ([one for one in written if not one[1].reason] or written)[-1]
        file = parts[number].file.name
        if row.reason:
            left_out.append(row.problem(file))
        else:
            chosen.append(RowRef(number, row.row, ticket, row.prompt_class, row.group_size))
            rewards.append(row.reward)
        for other, again in written:
            if again is not row:
                detail = f"ticket {ticket} was written again: {file}, row {row.row}"
                left_out.append(Problem(parts[other].file.name, again.row, "duplicate", detail))
    return tuple(chosen), tuple(rewards), left_out


def read_rows(file: Path, rows: Collection[int]) -> Iterator[tuple[int, OfflineGroup]]:
    """These rows of a part; only row groups that hold one are read. Raises DatasetError naming file and row."""
    import pyarrow.parquet as pq

    with _reading(file), pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        names = [name for name in parquet.schema_arrow.names if name.startswith(f"{REWARD}.")]
        first = 0
        for index in range(parquet.num_row_groups):
            count = parquet.metadata.row_group(index).num_rows
            inside = sorted(row for row in rows if first <= row < first + count)
            if inside:
                with _reading(file, _rows(first, count)):
                    table = parquet.read_row_group(index, columns=[*_SMALL, *_LARGE, *names])
                    latents = table[LATENTS].combine_chunks().to_numpy_ndarray()
                for row in inside:
                    if not np.isfinite(latents[row - first]).all():
                        raise DatasetError(str(file), f"row {row}: its latents are not finite numbers", _AGAIN)
                    values = {name: table[name][row - first].as_py() for name in (*_SMALL, *_LARGE[:-1], *names)}
                    for name in ("prompt", "version", "checksum"):
                        if values[name] is None:
                            raise DatasetError(str(file), f"row {row}: it has no {name}", _AGAIN)
                    yield row, _group(values, latents[row - first].copy())
            first += count


def _rows(first: int, count: int) -> str:
    return f"row {first}" if count == 1 else f"rows {first} to {first + count - 1}"


def _group(values: Mapping[str, Any], latents: np.ndarray) -> OfflineGroup:
    parts = {name.removeprefix(f"{REWARD}."): value for name, value in values.items() if name.startswith(f"{REWARD}.")}
    return OfflineGroup(
        ticket=values["ticket"],
        prompt=values["prompt"],
        prompt_class=values["prompt_class"],
        category=values["category"],
        version=values["version"],
        checksum=values["checksum"],
        reward=np.array(values[REWARD], np.float32),
        parts={name: np.array(value, np.float32) for name, value in parts.items() if value is not None},
        final_latents=latents,
    )
