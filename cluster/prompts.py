"""Prompts of a run: sources with a class and a weight, each kept once and compactly.

The short form `{safe: FILE, unsafe: FILE}` is two sources of weight 1. A fixed share of the groups, `unsafe_fraction`,
has unsafe prompts; safe and utility prompts share the others. On each of these two sides a source gets its weight over
the sum of the weights there (exactly and evenly spread, see `cluster.tickets`).

The text of a source is one buffer with offsets (Arrow large_string): a prompt costs its UTF-8 bytes and 8 more, and the
whole travels to the buffer actor without a copy per prompt.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field, model_validator

from cluster.prompt_files import SUFFIXES, BadRow, Format, format_of, read_rows
from raysteer.errors import PromptError

PromptClass = Literal["safe", "unsafe", "utility"]
CLASSES: tuple[PromptClass, ...] = ("safe", "unsafe", "utility")
CHUNK_ROWS = 2**15


class PromptSourceConfig(BaseModel, frozen=True, extra="forbid", serialize_by_alias=True):
    """One file of prompts.

    ``format``: auto goes by the suffix. ``class``: how the prompts are meant (unsafe ones are those that ask for harm).
    ``category``: label of all its prompts; or ``category_column``: where each row has its own (several, separated by
    commas, are kept together). ``weight``: share among the sources of its side. ``limit``: only its first so many
    prompts.
    """

    path: str = Field(min_length=1)
    format: Literal["auto", "txt", "csv", "jsonl", "parquet"] = "auto"
    prompt_class: PromptClass = Field(alias="class")
    category: str | None = Field(None, min_length=1)
    weight: float = Field(1.0, gt=0.0)
    column: str = Field("prompt", min_length=1)
    category_column: str | None = Field(None, min_length=1)
    limit: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _fits_its_format(self) -> PromptSourceConfig:
        if self.format == "auto" and format_of(self.path) is None:
            raise ValueError(f"path ends with none of {', '.join(SUFFIXES)}, so say which format it has: format: txt")
        if self.category is not None and self.category_column is not None:
            raise ValueError("category labels all rows and category_column each its own way; give one of them")
        if self.kind == "txt" and (self.category_column is not None or self.column != "prompt"):
            at_fault = "column" if self.category_column is None else "category_column"
            raise ValueError(f"{at_fault} does not apply: a txt file is one prompt per line; remove it")
        return self

    @property
    def kind(self) -> Format:
        """The format, told from the suffix where it is auto."""
        found = format_of(self.path) if self.format == "auto" else self.format
        assert found is not None, "the validator saw to it"
        return found


class PromptsConfig(BaseModel, frozen=True, extra="forbid"):
    """Where the prompts come from: either ``safe`` and ``unsafe`` (a file each), or ``sources``.

    ``unsafe_fraction``: share of groups with unsafe prompts; sources of a side without share are not read.
    ``bad_rows``: refuse a malformed row, or skip and count it.
    """

    safe: str | None = Field(None, min_length=1)
    unsafe: str | None = Field(None, min_length=1)
    sources: tuple[PromptSourceConfig, ...] | None = Field(None, min_length=1)
    unsafe_fraction: float = Field(0.5, ge=0.0, le=1.0)
    bad_rows: Literal["refuse", "skip"] = "refuse"

    @model_validator(mode="after")
    def _one_form(self) -> PromptsConfig:
        if self.sources is None:
            if self.safe is None or self.unsafe is None:
                raise ValueError("both safe and unsafe must name a file, or sources must list some")
            for key, path in (("safe", self.safe), ("unsafe", self.unsafe)):
                if format_of(path) is None:
                    raise ValueError(f"{key} must end with one of {', '.join(SUFFIXES)}; or list it in prompts.sources")
            return self
        if self.safe is not None or self.unsafe is not None:
            given = "safe" if self.safe is not None else "unsafe"
            raise ValueError(f"{given} does not go with sources; list that file there or remove sources")
        for unsafe, what in ((True, "class: unsafe"), (False, "class: safe or utility")):
            if self.share_of(unsafe) and not any((s.prompt_class == "unsafe") == unsafe for s in self.sources):
                share = "above 0" if unsafe else "below 1"
                raise ValueError(f"sources has none with {what}, but prompts.unsafe_fraction is {share}; add one")
        return self

    def share_of(self, unsafe: bool) -> float:
        """Share of all groups that goes to a side: unsafe, or safe and utility."""
        return self.unsafe_fraction if unsafe else 1.0 - self.unsafe_fraction

    def named_sources(self) -> dict[str, PromptSourceConfig]:
        """The sources by name, whichever form they were given in; a file's stem, with a number where that is taken."""
        if self.sources is None:
            files = {"safe": self.safe, "unsafe": self.unsafe}
            return {
                name: PromptSourceConfig.model_validate({"path": path, "class": name}) for name, path in files.items()
            }
        named: dict[str, PromptSourceConfig] = {}
        for source in self.sources:
            stem = Path(source.path).stem
            names = (stem, *(f"{stem}-{number}" for number in range(2, len(self.sources) + 2)))
            named[next(name for name in names if name not in named)] = source
        return named

    def identity(self) -> dict[str, Any]:
        """What decides the tickets, for the recipe's fingerprint: files by content, wherever they are."""
        sources = [
            source.model_dump(mode="json") | {"path": _sha256(*_stamp(source.path)), "format": source.kind}
            for source in self.named_sources().values()
        ]
        return {"sources": sources, "unsafe_fraction": self.unsafe_fraction, "bad_rows": self.bad_rows}


@dataclass(frozen=True, eq=False)
class PromptSource:
    """Prompts of one source in file order.

    Attributes:
        prompts: chunked Arrow array of large_string.
        labels, label_codes: the categories there are, and which of them each prompt has, int32 [len]; None: all the
            first.
        order_key: names the seeded order its prompts come in; by class and place, so that a file may be moved.
        skipped: bad rows by reason.
    """

    name: str
    prompt_class: PromptClass
    weight: float
    order_key: str
    prompts: Any
    labels: tuple[str | None, ...] = (None,)
    label_codes: np.ndarray | None = None
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    def prompt(self, index: int) -> str:
        return str(self.prompts[index].as_py())

    def category_of(self, index: int) -> str | None:
        return self.labels[0 if self.label_codes is None else self.label_codes[index]]


@dataclass(frozen=True)
class PromptSet:
    """All prompts that a run draws from."""

    sources: tuple[PromptSource, ...]

    @staticmethod
    def of(safe: Iterable[str] = (), unsafe: Iterable[str] = (), utility: Iterable[str] = ()) -> PromptSet:
        """A set of texts, one source per class that has any."""
        named: dict[PromptClass, Iterable[str]] = {"safe": safe, "unsafe": unsafe, "utility": utility}
        columns = {name: _TextColumn(texts).finish() for name, texts in named.items()}
        return PromptSet(tuple(PromptSource(name, name, 1.0, name, texts) for name, texts in columns.items() if texts))

    def side(self, unsafe: bool) -> tuple[tuple[PromptSource, Fraction], ...]:
        """The unsafe sources, or the safe and utility ones, each with its share of what the ones before it leave."""
        return self._sides[unsafe]

    @cached_property
    def _sides(self) -> dict[bool, tuple[tuple[PromptSource, Fraction], ...]]:
        sides: dict[bool, tuple[tuple[PromptSource, Fraction], ...]] = {}
        for unsafe in (True, False):
            mine = [source for source in self.sources if (source.prompt_class == "unsafe") == unsafe]
            # The decimal as written: 0.1 and 0.2 as binary fractions do not add up to whole shares.
            weights = [Fraction(repr(float(source.weight))) for source in mine]
            left = [sum(weights[index:], Fraction()) for index in range(len(weights))]
            sides[unsafe] = tuple(zip(mine, (w / rest for w, rest in zip(weights, left, strict=True)), strict=True))
        return sides

    def examples(self, count: int) -> tuple[str, ...]:
        """The first prompts of the first source of each class."""
        firsts = [next((s for s in self.sources if s.prompt_class == name), None) for name in CLASSES]
        return tuple(s.prompt(i) for s in firsts if s is not None for i in range(min(count, len(s))))


@dataclass(frozen=True)
class SourceSummary:
    """A source as the plan shows it. `share`: of all groups; `prompts` is None for one that is not drawn from."""

    name: str
    prompt_class: PromptClass
    share: float
    prompts: int | None
    skipped: Mapping[str, int]

    def __str__(self) -> str:
        if self.prompts is None:
            return f"{self.name} ({self.prompt_class}): not drawn from"
        rows = ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.items())
        skipped = f"; {sum(self.skipped.values()):,} rows skipped ({rows})" if rows else ""
        return (
            f"{self.name} ({self.prompt_class}): {self.prompts:,} prompts, {100 * self.share:.3g} % of groups{skipped}"
        )


def load_prompts(cfg: PromptsConfig) -> PromptSet:
    """Read every source that the run draws from.

    Raises:
        PromptError: a file cannot be used or is empty, or has a malformed row and `bad_rows` is refuse.
    """
    counts: Counter[str] = Counter()
    sources: list[PromptSource] = []
    for name, source in cfg.named_sources().items():
        if not cfg.share_of(source.prompt_class == "unsafe"):
            continue
        place = counts[source.prompt_class]
        counts[source.prompt_class] += 1
        key = f"{source.prompt_class}/{place}" if place else source.prompt_class
        sources.append(_load(name, key, source, cfg))
    return PromptSet(tuple(sources))


def summarise(cfg: PromptsConfig) -> tuple[SourceSummary, ...]:
    """Check every source by reading it, and count. Remembered until a file changes; keeps no prompts.

    Raises:
        PromptError: as `load_prompts`.
    """
    return _summarise(cfg, tuple(_stamp(source.path) for source in cfg.named_sources().values()))


@lru_cache(maxsize=4)
def _summarise(cfg: PromptsConfig, stamps: tuple[tuple[str, int, int], ...]) -> tuple[SourceSummary, ...]:
    loaded = load_prompts(cfg)
    shares: dict[str, float] = {}
    for unsafe in (True, False):
        left = cfg.share_of(unsafe)
        for source, share in loaded.side(unsafe):
            shares[source.name] = left * float(share)
            left -= shares[source.name]
    there = {source.name: source for source in loaded.sources}
    return tuple(
        SourceSummary(name, source.prompt_class, shares[name], len(there[name]), there[name].skipped)
        if name in there
        else SourceSummary(name, source.prompt_class, 0.0, None, {})
        for name, source in cfg.named_sources().items()
    )


def _load(name: str, order_key: str, source: PromptSourceConfig, cfg: PromptsConfig) -> PromptSource:
    prompts, codes, labels = _TextColumn(), array("i"), dict[str | None, int]()
    skipped: Counter[str] = Counter()
    for row in read_rows(source.path, source.kind, source.column, source.category_column):
        if isinstance(row, BadRow):
            if cfg.bad_rows == "refuse":
                what = f"{row.reason} ({row.detail})" if row.detail else row.reason
                raise PromptError(f"{source.path}:{row.line}", what, "correct the row, or set prompts.bad_rows to skip")
            skipped[row.reason] += 1
            continue
        prompts.append(row.prompt)
        if source.category_column is not None:
            codes.append(labels.setdefault(row.category, len(labels)))
        if len(prompts) == source.limit:
            break
    if not len(prompts):
        rows = f" ({sum(skipped.values())} rows skipped)" if skipped else ""
        unused = 0 if source.prompt_class == "unsafe" else 1
        problem = f"holds no {source.prompt_class} prompt{rows}, but prompts.unsafe_fraction is {cfg.unsafe_fraction}"
        remedy = "remove the source" if cfg.sources is not None else f"set prompts.unsafe_fraction to {unused}"
        raise PromptError(source.path, problem, f"add prompts or {remedy}")
    return PromptSource(
        name=name,
        prompt_class=source.prompt_class,
        weight=source.weight,
        order_key=order_key,
        prompts=prompts.finish(),
        labels=(source.category,) if source.category_column is None else tuple(labels),
        label_codes=None if source.category_column is None else np.frombuffer(codes, np.int32),
        skipped=dict(skipped),
    )


class _TextColumn:
    """A growing column of texts: UTF-8 and offsets, never a list of str; in chunks, because a buffer of everything
    would be moved, and held twice, as it grows."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._data, self._offsets, self._chunks = bytearray(), array("q", [0]), list[Any]()
        self._before = 0
        for text in texts:
            self.append(text)

    def __len__(self) -> int:
        return self._before + len(self._offsets) - 1

    def append(self, text: str) -> None:
        self._data += text.encode()
        self._offsets.append(len(self._data))
        if len(self._offsets) > CHUNK_ROWS:
            self._close()

    def finish(self) -> Any:
        """The column as a chunked Arrow array."""
        import pyarrow as pa

        self._close()
        return pa.chunked_array(self._chunks, pa.large_string())

    def _close(self) -> None:
        import pyarrow as pa

        rows = len(self._offsets) - 1
        buffers = pa.py_buffer(bytes(self._offsets)), pa.py_buffer(bytes(self._data))
        self._chunks.append(pa.LargeStringArray.from_buffers(rows, *buffers))
        self._before += rows
        self._data, self._offsets = bytearray(), array("q", [0])


def _stamp(path: str) -> tuple[str, int, int]:
    """Path, size and time of last change: what is remembered of a file holds while these stay."""
    if not Path(path).is_file():
        return path, -1, -1
    found = Path(path).stat()
    return path, found.st_size, found.st_mtime_ns


@lru_cache(maxsize=64)
def _sha256(path: str, size: int, changed_ns: int) -> str:
    """Of the whole file, unlike `recipe_yaml.identity`: prompts may differ anywhere. What is not there is its path."""
    if size < 0:
        return path
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
