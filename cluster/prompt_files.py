"""Readers of prompt files: rows in file order, one at a time; a malformed one comes as a `BadRow` with line and reason.

Nothing is repaired and nothing is guessed: what becomes of a bad row is the caller's decision. A file is streamed (at
most one record, or one Parquet batch, is held), so its size does not matter. What concerns the whole file (it cannot
be opened, or has no such column) is a PromptError at once. A new format is one reader and one line in `READERS`.

Text is UTF-8, with or without a byte order mark; lines end with LF, CRLF or CR; blank lines are no rows. The line of
a Parquet row is its number, from 1.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from raysteer.errors import PromptError

Format = Literal["txt", "csv", "jsonl", "parquet"]

SUFFIXES: dict[str, Format] = {".txt": "txt", ".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}
# A quote that is open for so long was never closed: without a bound one stray quote would swallow the rest of a file.
MAX_QUOTED_BYTES = 256 * 2**10
PARQUET_ROWS = 4096

_BOM = b"\xef\xbb\xbf"
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell what UTF-8 cannot
_FIELD = re.compile(r'"([^"]*(?:""[^"]*)*)"|([^",]*)')


class Row(NamedTuple):
    """A prompt, stripped and not empty; `category` holds its labels as "a, b", or None."""

    prompt: str
    category: str | None = None


class BadRow(NamedTuple):
    """A row that is not used. `reason` is one of few (rows are counted by it), `detail` says what was found."""

    line: int
    reason: str
    detail: str = ""


Line = tuple[int, bytes]
Reader = Callable[[Path, str, str | None], Iterator[Row | BadRow]]


def format_of(path: str) -> Format | None:
    """The format that the suffix of a path promises; None for a suffix that promises none."""
    return SUFFIXES.get(Path(path).suffix.lower())


def read_rows(path: str, kind: Format, column: str, category_column: str | None) -> Iterator[Row | BadRow]:
    """Rows of a prompt file.

    Args:
        column: where the prompt is; of no meaning for txt.
        category_column: where the labels are; None: rows have no category.

    Raises:
        PromptError: the file cannot be opened or read, is torn, or has no such column.
    """
    try:
        yield from READERS[kind](Path(path), column, category_column)
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise PromptError(path, f"cannot be read ({reason})", f"give a {kind} file with prompts") from error


def read_txt(path: Path, column: str, category_column: str | None) -> Iterator[Row | BadRow]:
    """One prompt per line."""
    with path.open("rb") as file:
        for number, raw in _lines(file):
            text = _decode(number, raw)
            if isinstance(text, BadRow):
                yield text
            elif text := text.strip():
                yield Row(text)


def read_csv(path: Path, column: str, category_column: str | None) -> Iterator[Row | BadRow]:
    """Comma separated, quoted as in RFC 4180, with a header. I2P is such a file: prompt, categories, ... ."""
    with path.open("rb") as file:
        records = _csv_records(_lines(file))
        header = next(records, None)
        if header is None or isinstance(header, BadRow):
            what = "is empty" if header is None else f"has no readable header ({header.reason})"
            raise PromptError(str(path), what, f"its first line must name the columns, {column} among them")
        names = [name.strip() for name in header[1]]
        prompt_at, category_at = _columns(path, names, column, category_column)
        for record in records:
            if isinstance(record, BadRow):
                yield record
                continue
            number, fields = record
            if len(fields) != len(names):
                yield BadRow(number, "wrong number of columns", f"{len(fields)}, but the header has {len(names)}")
                continue
            yield _row(number, fields[prompt_at], None if category_at is None else fields[category_at])


def read_jsonl(path: Path, column: str, category_column: str | None) -> Iterator[Row | BadRow]:
    """One JSON object per line. GenEval's metadata is such a file: tag, include, exclude, prompt."""
    with path.open("rb") as file:
        for number, raw in _lines(file):
            text = _decode(number, raw)
            if isinstance(text, BadRow):
                yield text
                continue
            if not text.strip():
                continue
            try:
                item = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield BadRow(number, "bad JSON", getattr(error, "msg", type(error).__name__))
                continue
            if not isinstance(item, dict):
                yield BadRow(number, "wrong type", "the line is no JSON object")
                continue
            missing = [key for key in (column, category_column) if key is not None and key not in item]
            if missing:
                yield BadRow(number, "missing key", f"{missing[0]!r}; its keys are: {_listed(list(item))}")
            else:
                yield _row(number, item[column], None if category_column is None else item[category_column])


def read_parquet(path: Path, column: str, category_column: str | None) -> Iterator[Row | BadRow]:
    """A text column, and another one with the labels."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def texts(batch: Any, name: str) -> list[bytes | None]:
        # As bytes, because Parquet writers do not check UTF-8 and one bad row is to be one bad row.
        array = batch.column(name)
        array = array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
        return array.cast(pa.large_binary()).to_pylist()  # type: ignore[no-any-return]

    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            schema = file.schema_arrow
            prompt_at, category_at = _columns(path, schema.names, column, category_column)
            names = [schema.names[at] for at in (prompt_at, category_at) if at is not None]
            for name in names:
                kind = schema.field(name).type
                kind = kind.value_type if pa.types.is_dictionary(kind) else kind
                if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                    raise PromptError(str(path), f"its column {name} holds {kind}, not text", "name another column")
            number = 0
            for batch in file.iter_batches(PARQUET_ROWS, columns=names):
                prompts = texts(batch, names[0])
                labels = texts(batch, names[1]) if category_at is not None else [None] * len(prompts)
                for prompt, label in zip(prompts, labels, strict=True):
                    number += 1
                    found = [None if raw is None else _decode(number, raw) for raw in (prompt, label)]
                    bad = next((text for text in found if isinstance(text, BadRow)), None)
                    yield _row(number, *found) if bad is None else bad
    except (pa.ArrowException, UnicodeError) as error:
        raise PromptError(str(path), f"is no whole Parquet file ({error})", "write or copy it again") from error


READERS: dict[Format, Reader] = {"txt": read_txt, "csv": read_csv, "jsonl": read_jsonl, "parquet": read_parquet}


def _lines(file: IO[bytes]) -> Iterator[Line]:
    """Lines without their ends and the byte order mark, numbered from 1."""
    number = 0
    for raw in file:
        for line in raw.splitlines():
            number += 1
            yield number, line.removeprefix(_BOM) if number == 1 else line


def _decode(number: int, raw: bytes) -> str | BadRow:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = number + raw.count(b"\n", 0, error.start)
        return BadRow(line, "not UTF-8 text", f"byte 0x{raw[error.start]:02x}")
    if "\0" in text:
        return BadRow(number, "not UTF-8 text", "a NUL character; is it UTF-16?")
    return text


def _csv_records(lines: Iterable[Line]) -> Iterator[tuple[int, list[str]] | BadRow]:
    """Records with the line they begin in. A record ends where its quotes are even; after a broken one reading goes on
    with the very next line, so that a stray quote costs one row."""
    source, again = iter(lines), deque[Line]()

    def following() -> Line | None:
        return again.popleft() if again else next(source, None)

    while (first := following()) is not None:
        number, raw = first
        held: list[Line] = []
        quotes, size = raw.count(b'"'), len(raw)
        while quotes % 2 and size < MAX_QUOTED_BYTES and (more := following()) is not None:
            held.append(more)
            quotes, size = quotes + more[1].count(b'"'), size + len(more[1])
        if quotes % 2:
            again.extendleft(reversed(held))
            yield BadRow(number, "broken quoting", "a quote is opened and not closed")
            continue
        text = _decode(number, b"\n".join([raw, *(line for _, line in held)]) if held else raw)
        if isinstance(text, BadRow):
            yield text
        elif fields := _split(text):
            if text.strip():
                yield number, fields
        else:
            again.extendleft(reversed(held))
            yield BadRow(number, "broken quoting", "a quote inside a field must be doubled, and the field quoted")


def _split(record: str) -> list[str] | None:
    """Fields of a record; None when its quoting is broken."""
    if '"' not in record:
        return record.split(",")
    fields: list[str] = []
    start = 0
    while (match := _FIELD.match(record, start)) is not None:
        quoted, plain = match.groups()
        fields.append(plain if quoted is None else quoted.replace('""', '"'))
        if match.end() == len(record):
            return fields
        if record[match.end()] != ",":
            return None
        start = match.end() + 1
    return None


def _columns(path: Path, names: Sequence[str], column: str, category_column: str | None) -> tuple[int, int | None]:
    """Where the prompt and the category are. Raises PromptError naming the columns there are."""
    for name in (column, category_column):
        if name is not None and names.count(name) != 1:
            what = "has no column" if name not in names else "has more than one column"
            remedy = "name the right one as column or category_column of this source in prompts.sources"
            raise PromptError(str(path), f"{what} {name!r}; its columns are: {_listed(names)}", remedy)
    return names.index(column), None if category_column is None else names.index(category_column)


def _row(number: int, prompt: Any, category: Any) -> Row | BadRow:
    """A row of values as they were found, checked."""
    if prompt is None or prompt == "":
        return BadRow(number, "empty prompt")
    if not isinstance(prompt, str):
        return BadRow(number, "wrong type", f"the prompt is {type(prompt).__name__}, not text")
    if isinstance(category, list) and all(isinstance(label, str) for label in category):
        category = ",".join(category)
    if category is not None and not isinstance(category, str):
        return BadRow(number, "wrong type", f"the category is {type(category).__name__}, not text")
    text, label = prompt.strip(), _label(category) if category else None
    if not text:
        return BadRow(number, "empty prompt")
    whole = text + label if label else text
    if not whole.isascii() and _SURROGATE.search(whole):
        return BadRow(number, "not UTF-8 text", "half of a surrogate pair")
    return Row(text, label)


@lru_cache(maxsize=1024)
def _label(category: str) -> str | None:
    return ", ".join(filter(None, (label.strip() for label in category.split(",")))) or None


def _listed(names: Sequence[str], most: int = 12) -> str:
    shown = ", ".join(str(name)[:40] or '""' for name in names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
