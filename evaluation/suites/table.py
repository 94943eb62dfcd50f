"""Tables of prompts with named columns, as the field publishes them: read whole and checked before anything is drawn.

A ``.csv`` has a header (RFC 4180; a quoted field may hold commas and line ends). A ``.txt`` is a table of one column,
``prompt``, a line each. Text is UTF-8, with or without a byte order mark. Nothing is repaired: a row that is not as it
should be is a PromptError with file and line, because a figure over fewer prompts is a figure of another protocol.
Prompts are kept as they are written, spaces included.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from raysteer.errors import PromptError

PROMPT = "prompt"
#: where published files say the seed and the guidance of a prompt
SEED_COLUMNS = {"evaluation": "evaluation_seed", "sd": "sd_seed"}
GUIDANCE_COLUMNS = {"evaluation": "evaluation_guidance", "sd": "sd_guidance_scale"}
OFFICIAL = "give the file of this protocol (docs/suites.md says where it is)"

_MAX_SEED = 2**63 - 1
_NAMES_SHOWN = 24


class Row(NamedTuple):
    """Fields of a record, and the line that it begins in, from 1."""

    line: int
    fields: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table that has at least one row, every row with as many fields as there are columns.

    Attributes:
        sha256: of the file's bytes.
    """

    path: str
    sha256: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def texts(self, column: str, remedy: str = OFFICIAL) -> list[str]:
        """The texts of a column.

        Raises:
            PromptError: there is no such column (says which there are), or a text is blank (file and line).
        """
        return [text for _, text in self._filled(column, remedy)]

    def integers(self, column: str, remedy: str = OFFICIAL) -> list[int]:
        """The whole numbers of a column, 0 and above; "7.0" is one, as pandas writes them beside an empty cell.

        Raises:
            PromptError: as `texts`; a cell holds something else.
        """
        return [self._integer(row, column, text) for row, text in self._filled(column, remedy)]

    def numbers(self, column: str, remedy: str = OFFICIAL) -> list[float]:
        """The finite numbers of a column, 0 and above.

        Raises:
            PromptError: as `texts`; a cell holds something else.
        """
        return [self._number(row, column, text) for row, text in self._filled(column, remedy)]

    def only_one_of(self, candidates: Iterable[str], key: str) -> str:
        """The one column that has a name of `candidates`.

        Raises:
            PromptError: there is none, or there are several; names the columns, and `key` as the remedy.
        """
        found = [name for name in candidates if name in self.columns]
        if len(found) == 1:
            return found[0]
        what = (
            f"has several columns that may be meant ({', '.join(found)})" if found else "has no column of a known name"
        )
        raise PromptError(self.path, f"{what}; its columns are: {self._listed()}", f"name the right one in {key}")

    def _filled(self, column: str, remedy: str) -> Iterator[tuple[Row, str]]:
        if self.columns.count(column) != 1:
            what = "has no column" if column not in self.columns else "has more than one column"
            raise PromptError(self.path, f"{what} {column!r}; its columns are: {self._listed()}", remedy)
        at = self.columns.index(column)
        for row in self.rows:
            if not row.fields[at].strip():
                raise PromptError(f"{self.path}:{row.line}", f"its {column} is empty", "fill it in or take the row out")
            yield row, row.fields[at]

    def _number(self, row: Row, column: str, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0.0 <= value < math.inf:
            raise self._wrong(row, column, text, "a number, 0 or above")
        return value

    def _integer(self, row: Row, column: str, text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            number = self._number(row, column, text)
            value = int(number)
            if value != number:
                raise self._wrong(row, column, text, "a whole number") from None
        if not 0 <= value <= _MAX_SEED:
            raise self._wrong(row, column, text, f"a whole number from 0 to {_MAX_SEED}")
        return value

    def _wrong(self, row: Row, column: str, text: str, needed: str) -> PromptError:
        return PromptError(f"{self.path}:{row.line}", f"its {column} is {text[:40]!r}", f"it must be {needed}")

    def _listed(self) -> str:
        shown = ", ".join(name[:40] or '""' for name in self.columns[:_NAMES_SHOWN])
        return f"{shown} and {len(self.columns) - _NAMES_SHOWN} more" if len(self.columns) > _NAMES_SHOWN else shown


def read_table(path: str) -> Table:
    """The table of a ``.csv`` or ``.txt`` file.

    Raises:
        PromptError: the file cannot be read, is not UTF-8, holds no rows, or has a broken row (file and line).
    """
    kind = Path(path).suffix.lower()
    if kind not in (".csv", ".txt"):
        raise PromptError(path, "is neither .csv nor .txt", "give a CSV with a header, or one prompt per line")
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise PromptError(path, f"cannot be read ({reason})", OFFICIAL) from error
    text = _decode(path, raw)
    columns, rows = _csv(path, text) if kind == ".csv" else _txt(text)
    if not rows:
        raise PromptError(path, "holds no prompts", OFFICIAL)
    return Table(path, hashlib.sha256(raw).hexdigest(), columns, rows)


def spread(count: int, limit: int | None) -> list[int]:
    """Which of `count` rows a trial of at most `limit` takes: evenly spread, for many files are sorted by category."""
    taken = count if limit is None else min(count, limit)
    return [position * count // taken for position in range(taken)]


def image_seeds(seed: int, images: int) -> tuple[int, ...]:
    """Seeds of the images of one prompt: its own first, the others derived from it (SeedSequence, 32 bits each)."""
    return (seed, *np.random.SeedSequence(seed).generate_state(images).tolist()[: images - 1])


@dataclass(frozen=True)
class Drawing:
    """With which seed and guidance each row is drawn, and which columns say so.

    Attributes:
        guidance: None where the file does not set it.
    """

    seeds: list[int]
    guidance: list[float | None]
    seed_column: str | None
    guidance_column: str | None

    def protocol(self) -> dict[str, str]:
        """Where seeds and guidance are from."""
        return {
            "seeds_from": self.seed_column or "evaluation.seed",
            "guidance_from": self.guidance_column or "evaluation.guidance_scale",
        }


def drawing(
    table: Table,
    seed: int,
    section: str,
    seed_column: str | None = None,
    guidance_column: str | None = None,
    prefer: Literal["evaluation", "sd"] = "evaluation",
) -> Drawing:
    """Seeds and guidance of every row.

    Args:
        seed: rows get seeds derived from it where the file has none.
        section: of the recipe, named in errors.
        seed_column: None is the one of `SEED_COLUMNS` that the file has; the same for `guidance_column`.
        prefer: which, where it has both.

    Raises:
        PromptError: a column that was named is not there; a cell is no seed or no guidance (file and line).
    """
    seed_column = seed_column or _first(table, SEED_COLUMNS, prefer)
    guidance_column = guidance_column or _first(table, GUIDANCE_COLUMNS, prefer)
    if seed_column is None:
        seeds = np.random.SeedSequence(seed % 2**64).generate_state(len(table)).tolist()
    else:
        seeds = table.integers(seed_column, f"name the right one in {section}.seed_column")
    guidance: list[float | None] = [None] * len(table)
    if guidance_column is not None:
        guidance = list(table.numbers(guidance_column, f"name the right one in {section}.guidance_column"))
    return Drawing(seeds, guidance, seed_column, guidance_column)


def _first(table: Table, names: Mapping[str, str], prefer: str) -> str | None:
    return next((name for name in (names[prefer], *names.values()) if name in table.columns), None)


def _decode(path: str, raw: bytes) -> str:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        what = f"is not UTF-8 text (byte 0x{raw[error.start]:02x})"
        raise PromptError(f"{path}:{line}", what, "save it as UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise PromptError(f"{path}:{line}", "holds a NUL character (is it UTF-16?)", "save it as UTF-8")
    return text


def _txt(text: str) -> tuple[tuple[str, ...], tuple[Row, ...]]:
    # not splitlines(): adversarial prompts hold characters that it takes for line ends
    lines = enumerate(io.StringIO(text, newline=None), start=1)
    return (PROMPT,), tuple(Row(number, (line.rstrip("\n"),)) for number, line in lines if line.strip())


def _csv(path: str, text: str) -> tuple[tuple[str, ...], tuple[Row, ...]]:
    records = _records(path, text)
    header = next(records, None)
    if header is None:
        raise PromptError(path, "is empty", "its first line must name the columns")
    columns = tuple(name.strip() for name in header.fields)
    rows = tuple(records)
    for row in rows:
        if len(row.fields) != len(columns):
            what = f"has {len(row.fields)} fields and the header has {len(columns)}"
            raise PromptError(f"{path}:{row.line}", what, "correct the row; a text with commas must be quoted")
    return columns, rows


def _records(path: str, text: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                yield Row(line, tuple(fields))
            line = reader.line_num + 1
    except csv.Error as error:
        remedy = "close the quote that this row opens, and double the quotes inside a quoted text"
        raise PromptError(f"{path}:{line}", f"is broken CSV ({error})", remedy) from error
