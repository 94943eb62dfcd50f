"""Figures in words: numbers as they are printed, and how a difference is said."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evaluation.comparison import Difference, p_text

NOTHING = "–"
UNCLEAR = "unclear"


@dataclass(frozen=True)
class Change:
    """How a figure differs from the first card's, as the page says it; the reading is `evaluation.comparison`'s."""

    found: Difference

    @property
    def meaning(self) -> str:
        """What colours it: only what chance does not explain is "better" or "worse"."""
        return self.found.reading if self.found.reading in ("better", "worse") else UNCLEAR

    @property
    def arrow(self) -> str:
        return "▲" if self.found.value > 0 else "▼" if self.found.value < 0 else "="

    @property
    def text(self) -> str:
        return signed(self.found.value)

    @property
    def interval(self) -> str:
        return f"[{signed(self.found.low)}, {signed(self.found.high)}]" if finite(self.found.low) else ""

    @property
    def p(self) -> str:
        return "" if self.found.p_holm is None else p_text(self.found.p_holm)


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def bounded(figure: Mapping[str, Any]) -> bool:
    """Whether a figure has an interval."""
    return finite(figure.get("low")) and finite(figure.get("high"))


def number(value: Any) -> str:
    """As many decimals as its size calls for."""
    if not finite(value):
        return NOTHING
    if isinstance(value, int):
        return typeset(f"{value:,}")
    size = abs(value)
    return typeset(f"{value:.3f}" if size < 10 else f"{value:.2f}" if size < 100 else f"{value:,.1f}")


def typeset(text: str) -> str:
    """A printed number with a minus sign that is one, and with none where all that is left is zero."""
    return text.replace("-", "−") if text.strip("-0.,") else text.removeprefix("-")


def signed(value: Any) -> str:
    """As `number`, with its sign; zero has none."""
    text = number(value)
    return text if text.startswith("−") or not text.strip("0.,") or text == NOTHING else f"+{text}"


def interval(figure: Mapping[str, Any]) -> str:
    """``[low, high]``; empty where there is none."""
    return f"[{number(figure['low'])}, {number(figure['high'])}]" if bounded(figure) else ""


def in_words(figure: Mapping[str, Any]) -> str:
    """Such as: 0.786 [0.736, 0.832], n = 280."""
    count = f"n = {number(figure['n'])}" if finite(figure.get("n")) else ""
    return ", ".join(filter(None, (f"{number(figure.get('value'))} {interval(figure)}".strip(), count)))


def words(name: str) -> str:
    """A key as a person writes it."""
    return name.replace("_", " ")


def titled(name: str, figure: Mapping[str, Any]) -> str:
    """A figure's title, beginning with a capital."""
    text = str(figure.get("title") or words(name))
    return text[:1].upper() + text[1:]


def direction(figure: Mapping[str, Any]) -> str:
    better = figure.get("better")
    return f"{better} is better" if better in ("lower", "higher") else ""
