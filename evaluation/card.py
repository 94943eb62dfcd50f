"""The metric card: the figures of one model on one suite, with everything that they depend on.

``protocol`` is what must be equal for two cards to be comparable; ``model`` and ``software`` are what may differ.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, FiniteFloat, ValidationError, model_validator

from raysteer.errors import CardError

FORMAT = 1
CARD, MARKDOWN = "card.json", "card.md"


@dataclass(frozen=True)
class Card:
    """See the module; all values are JSON values, as in ``card.json``.

    Attributes:
        label: what the model is called in tables: "base", "adapted", a run's name.
        protocol: suite, prompt-set hash, images, seeds, sampler, steps, guidance, resolution, safety checker,
            detectors.
        model: {"path", "sha256", "adapter": None or {"source", "checksum"}}.
        figures: name to {value, low, high, standard_error, n, title, better}, the headline first.
        samples: name to {"values": one per prompt or None, "strata": None or one label per prompt}.
        groups: kind to label to {value, low, high, standard_error, n}.
        sweeps: name to {"at", "thresholds", "figures"}.
        gallery: images that can be shown: {"index", "file" (relative to the card), "prompt", "labels", "unsafe",
            "seen"}.
    """

    suite: str
    label: str
    created: str
    protocol: Mapping[str, Any]
    model: Mapping[str, Any]
    software: Mapping[str, str]
    figures: Mapping[str, Mapping[str, Any]]
    samples: Mapping[str, Mapping[str, Any]]
    groups: Mapping[str, Mapping[str, Mapping[str, Any]]]
    sweeps: Mapping[str, Mapping[str, Any]]
    counts: Mapping[str, int]
    gallery: Sequence[Mapping[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def as_json(self) -> str:
        """The file's text. JSON has no NaN: a number that is none becomes null."""
        return json.dumps(_finite({"format": FORMAT, **vars(self)}), indent=1, allow_nan=False) + "\n"


def card_path(source: Path) -> Path:
    """``card.json`` of a folder, or the file itself."""
    return source / CARD if source.is_dir() else source


def write_card(folder: Path, card: Card) -> Path:
    """Write ``card.md`` and then ``card.json``, each whole or not at all; the path of ``card.json``.

    The JSON comes last: where it is, the evaluation is complete. Raises ValueError, with nothing written, for a card
    that `read_card` would refuse.
    """
    from evaluation.card_markdown import markdown

    text = card.as_json()
    _check(json.loads(text))
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / MARKDOWN, markdown(card))
    return replace_text(folder / CARD, text)


def read_card(source: Path) -> Card:
    """The card of a folder or a file.

    Raises:
        CardError: there is no card, it cannot be read, or it is not one; the message names the field.
    """
    file = card_path(source)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CardError(str(file), "there is no such card", "raysteer eval RECIPE writes one") from None
    except OSError as error:
        raise CardError(str(file), f"it cannot be read ({error.strerror})", "give a card.json or its folder") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CardError(str(file), f"it is not JSON ({error})", "give a card.json, or evaluate again") from None
    if not isinstance(found, dict) or "format" not in found:
        raise CardError(str(file), "it is JSON, but not a metric card: no 'format'", "give a card.json")
    number = found["format"]
    if number != FORMAT or isinstance(number, bool):
        remedy = f"this raysteer reads format {FORMAT}; evaluate again, or use the raysteer that wrote it"
        raise CardError(str(file), f"it is a card of format {number!r}", remedy)
    try:
        _check(found)
    except ValidationError as error:
        raise CardError(str(file), _first(error), "the card is damaged or edited; evaluate again") from None
    return Card(**{name: value for name, value in found.items() if name != "format"})


def replace_text(file: Path, text: str) -> Path:
    """Write beside, then rename: readers see the old file or the new one."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)
    return file


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


# ---- what a file must hold to be a card ------------------------------------------------------------------------------


def _check(found: Mapping[str, Any]) -> None:
    """Raises ValidationError, a ValueError, for what is no card."""
    _Stored.model_validate(found, strict=True)


def _first(error: ValidationError) -> str:
    """What is wrong first, with its place, and how much more."""
    found = error.errors(include_url=False, include_input=True)
    problem = found[0]
    place = ".".join(str(part) for part in problem["loc"]) or "card"
    if problem["type"] == "missing":
        words = f"{place} is missing"
    elif problem["type"] == "extra_forbidden":
        words = f"{place} is no field of a card"
    else:
        given = repr(problem["input"])
        given = given if len(given) <= 60 else given[:59] + "…"
        words = f"{place} {given}: {problem['msg'].removeprefix('Value error, ')}"
    return words if len(found) == 1 else f"{words} (and {len(found) - 1} more)"


def _inside(file: str) -> str:
    path = PurePosixPath(file)
    if not file or path.is_absolute() or ".." in path.parts or "\\" in file or "\0" in file:
        raise ValueError("must be a path below the card's folder")
    return file


class _Interval(BaseModel, extra="forbid"):
    """Bounds are null where a figure has none."""

    value: FiniteFloat
    low: FiniteFloat | None
    high: FiniteFloat | None
    standard_error: FiniteFloat | None
    n: Annotated[int, Field(ge=0)]


class _Figure(_Interval):
    title: str
    better: Literal["lower", "higher"]


class _Sample(BaseModel, extra="forbid"):
    values: list[FiniteFloat | None]
    strata: list[str] | None

    @model_validator(mode="after")
    def _one_label_each(self) -> _Sample:
        if self.strata is not None and len(self.strata) != len(self.values):
            raise ValueError(f"{len(self.values)} values, but {len(self.strata)} strata")
        return self


class _Sweep(BaseModel, extra="forbid"):
    at: FiniteFloat
    thresholds: list[FiniteFloat]
    figures: list[_Interval]

    @model_validator(mode="after")
    def _one_figure_each(self) -> _Sweep:
        if len(self.figures) != len(self.thresholds):
            raise ValueError(f"{len(self.thresholds)} thresholds, but {len(self.figures)} figures")
        return self


class _Shown(BaseModel, extra="forbid"):
    index: Annotated[int, Field(ge=0)]
    file: Annotated[str, AfterValidator(_inside)]
    prompt: str
    labels: list[str]
    unsafe: bool
    seen: list[str]


class _Adapter(BaseModel, extra="allow"):
    source: str
    checksum: str


class _Model(BaseModel, extra="allow"):
    path: str
    sha256: str | None
    adapter: _Adapter | None


class _Stored(BaseModel, extra="forbid"):
    """`Card`, field for field, and the format; `protocol` is the suite's own and is free."""

    format: int
    suite: Annotated[str, Field(min_length=1)]
    label: Annotated[str, Field(min_length=1)]
    created: str
    protocol: dict[str, Any]
    model: _Model
    software: dict[str, str]
    figures: Annotated[dict[str, _Figure], Field(min_length=1)]
    samples: dict[str, _Sample]
    groups: dict[str, dict[str, _Interval]]
    sweeps: dict[str, _Sweep]
    counts: dict[str, int]
    gallery: list[_Shown] = []
    seconds: float = 0.0
