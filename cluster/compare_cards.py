"""``raysteer compare`` of metric cards: which cards are meant, what they are called, and what is written where."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from evaluation.card import CARD, Card, read_card, replace_text
from evaluation.comparison import Comparison, compare, comparison_markdown
from raysteer.errors import CardError, StorageError

FIRST = "base"
MARKDOWN, PAGE = "comparison.md", "index.html"
_LONGEST_NAME = 100


def card_files(arguments: Sequence[str]) -> list[Path] | None:
    """The cards that are meant; None where no argument is a card, so that runs are.

    An argument is a card if it is a JSON file, a folder with a ``card.json``, or a folder of such folders, as
    ``raysteer eval`` writes for each suite: then all of them, `FIRST` first.

    Raises:
        CardError: cards beside what is none, a card that is not there, cards of several suites.
    """
    found = {argument: _cards_of(Path(argument)) for argument in arguments}
    cards = [argument for argument, files in found.items() if files]
    others = [argument for argument, files in found.items() if not files]
    if not cards:
        return None
    if others:
        remedy = "name cards alone (a card.json or its folder), or runs alone"
        raise CardError(others[0], f"this is no metric card, but {cards[0]} is", remedy)
    return [file for argument in arguments for file in found[argument]]


def _cards_of(path: Path) -> list[Path]:
    if path.is_file() and path.suffix == ".json":
        return [path]
    if path.name == CARD:
        raise CardError(str(path), "there is no such card", "raysteer eval RECIPE writes one")
    if (path / CARD).is_file():
        return [path / CARD]
    suites: dict[Path, list[Path]] = {}
    for file in _below(path, f"*/{CARD}") or _below(path, f"*/*/{CARD}"):
        suites.setdefault(file.parent.parent, []).append(file)
    if len(suites) > 1:
        there = ", ".join(str(suite) for suite in suites)
        raise CardError(str(path), f"it holds cards of {len(suites)} suites", f"name one: {there}")
    return next(iter(suites.values()), [])


def _below(path: Path, pattern: str) -> list[Path]:
    found = [file for file in path.glob(pattern) if file.is_file()] if path.is_dir() else []
    files = [file for file in found if not _set_aside(file)]
    return sorted(files, key=lambda file: (file.parent.name != FIRST, file))


def _set_aside(file: Path) -> bool:
    """Is it of an evaluation that made room for another of the same label? Its folder has a number then
    (`cluster.evalstore`)."""
    folder, _, number = file.parent.name.rpartition(".")
    newer = file.parent.parent / folder / CARD
    return number.isdigit() and bool(folder) and newer.is_file() and read_card(newer).label == read_card(file).label


def compare_files(files: Sequence[Path]) -> Comparison:
    """Read and compare; cards of one label are told apart by where they are.

    Raises:
        CardError: a card that cannot be read; see also `evaluation.comparison.compare`.
    """
    cards = [read_card(file) for file in files]
    return compare(cards, names(files, cards))


def names(files: Sequence[Path], cards: Sequence[Card]) -> list[str]:
    """Labels; for those that several have, the label and the first folder that differs: "adapted (sd15-r2)"."""
    counts = Counter(card.label for card in cards)
    called = []
    for file, card in zip(files, cards, strict=True):
        name = card.label
        if counts[name] > 1:
            place = _told_apart(file, [other for other, twin in zip(files, cards, strict=True) if twin.label == name])
            name = f"{name} ({place})" if place else name
        called.append(name)
    seen: Counter[str] = Counter()
    for index, name in enumerate(called):
        seen[name] += 1
        called[index] = name if seen[name] == 1 else f"{name} {seen[name]}"  # one card, named twice
    return called


def _told_apart(file: Path, twins: Sequence[Path]) -> str | None:
    """The first part of the path that is not the same in all; None if they are one file."""
    paths = zip(*(twin.absolute().parts for twin in twins), strict=False)
    return next((file.absolute().parts[at] for at, parts in enumerate(paths) if len(set(parts)) > 1), None)


def default_folder(files: Sequence[Path], comparison: Comparison) -> Path:
    """``comparison-<A>-<B>`` beside the folder of the first card: with the figures it is about."""
    called = "-".join(re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") for name in comparison.names)
    return files[0].absolute().parent.parent / f"comparison-{called}"[:_LONGEST_NAME]


def write_json(comparison: Comparison, file: Path) -> None:
    """Everything, as JSON.

    Raises:
        StorageError: the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps(comparison.as_dict(), indent=1) + "\n")
    except OSError as error:
        raise StorageError(str(file), f"it cannot be written ({error.strerror})", "name another --json") from None


def write(comparison: Comparison, files: Sequence[Path], folder: Path, notify: Callable[[str], None]) -> None:
    """Write plots, Markdown and the page to `folder`.

    Raises:
        StorageError: the folder cannot be written.
    """
    from evaluation import report
    from evaluation.comparison_plots import draw

    try:
        pictures = draw(comparison, folder)
        page = comparison_markdown(comparison, [picture.name for picture in pictures])
        text = replace_text(folder / MARKDOWN, page)
        named = [replace(card, label=name) for name, card in zip(comparison.names, comparison.cards, strict=True)]
        sources = [(file.absolute().parent, card) for file, card in zip(files, named, strict=True)]
        shown = report.write(sources, folder / PAGE, f"{comparison.cards[0].suite}: {' / '.join(comparison.names)}")
    except OSError as error:
        raise StorageError(str(folder), f"it cannot be written ({error.strerror})", "name another --out") from None
    for kind, file in (*(("picture", picture) for picture in pictures), ("text", text), ("page", shown)):
        notify(f"{kind:<8} {file}")
