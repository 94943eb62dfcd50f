"""``raysteer data``: what is in a dataset of scored groups, whether all of it can be read, whether it fits a recipe.

Everything is read, latents included, so what this finds whole is whole. Figures are those of the usable groups.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.config import Recipe
from cluster.fit import misfits
from cluster.memory import readable_bytes
from cluster.preflight import check_model
from learner.dataset import PARTS, GroupDataset, OfflineGroup, Problem, RowRef, short
from raysteer.errors import DatasetError
from raysteer.text import one_line

CORRUPT = ("unreadable", "corrupt")
_AT_ONCE = 32  # groups in memory
_SHOWN = 8  # findings of a kind; the JSON file has all


@dataclass(frozen=True)
class Facts:
    """One group without its latents; `digest`: of their bytes."""

    ticket: int
    prompt: str
    prompt_class: str
    version: int
    checksum: str
    reward: np.ndarray
    parts: Mapping[str, np.ndarray]
    shape: tuple[int, ...]
    digest: bytes


@dataclass(frozen=True)
class DataReport:
    """What `examine` found.

    Attributes:
        dataset: as it was opened, without the groups that could not be read.
        groups: facts of every group that was read, in ticket order.
        corrupt: files and rows that are not what was written.
        copies: tickets whose latents are identical, in groups of two or more.
        misfits: why it cannot be used with the recipe, if one was given.
        size: bytes of all files.
    """

    dataset: GroupDataset
    groups: tuple[Facts, ...]
    corrupt: tuple[Problem, ...]
    copies: tuple[tuple[int, ...], ...]
    misfits: tuple[str, ...]
    size: int

    @property
    def good(self) -> bool:
        return not self.corrupt and not self.misfits

    def classes(self) -> dict[str, list[Facts]]:
        """Groups by prompt class."""
        found: defaultdict[str, list[Facts]] = defaultdict(list)
        for group in self.groups:
            found[group.prompt_class].append(group)
        return dict(sorted(found.items()))

    def versions(self, groups: Sequence[Facts] | None = None) -> dict[int, list[Facts]]:
        """These groups (all by default) by the adapter version that drew them, ascending."""
        found: defaultdict[int, list[Facts]] = defaultdict(list)
        for group in self.groups if groups is None else groups:
            found[group.version].append(group)
        return dict(sorted(found.items()))

    def as_json(self) -> dict[str, Any]:
        """Everything, in JSON types."""
        return {
            "folder": str(self.dataset.folder),
            "identity": self.dataset.identity,
            "files": list(self.dataset.files),
            "bytes": self.size,
            "groups": len(self.groups),
            "images": sum(len(group.reward) for group in self.groups),
            "prompts": len({group.prompt for group in self.groups}),
            "adapters": len({group.checksum for group in self.groups}),
            "lag": self.lag(),
            "latents": [{"shape": list(shape), "groups": count} for shape, count in self.shapes().items()],
            "all": figures(self.groups),
            "classes": {name: figures(groups) for name, groups in self.classes().items()},
            "versions": [{"version": number, **figures(groups)} for number, groups in self.versions().items()],
            "skipped": self.dataset.skipped,
            "problems": [vars(problem) for problem in (*self.dataset.problems, *self._unread())],
            "copies": [list(tickets) for tickets in self.copies],
            "misfits": list(self.misfits),
            "good": self.good,
        }

    def lag(self) -> dict[str, float]:
        """Versions by which groups are older than the newest one."""
        versions = np.array([group.version for group in self.groups])
        lags = versions.max() - versions if len(versions) else np.zeros(1)
        return {"mean": float(lags.mean()), "max": float(lags.max())}

    def shapes(self) -> Counter[tuple[int, ...]]:
        """Shapes of the groups' latents [G, C, h, w]."""
        return Counter(group.shape for group in self.groups)

    def render(self) -> str:
        """What it is and what is wrong with it, one fact per line. What is text in it is never more than text."""
        return "\n".join(f"{label:<12}{one_line(text)}" for label, text in self._lines())

    def table(self) -> tuple[list[str], list[tuple[str, list[str]]]]:
        """Header and rows: one for all prompts, and one for each class."""
        parts = sorted({name for group in self.groups for name in group.parts})
        header = ["prompts", "groups", "share", "reward", "spread", "in groups", *parts]
        rows = []
        for name, groups in [("all", list(self.groups)), *self.classes().items()]:
            of = figures(groups)
            numbers = [of["reward_mean"], of["reward_std"], of["std_in_groups"], *(of["parts"].get(p) for p in parts)]
            share = f"{100 * len(groups) / max(1, len(self.groups)):.0f} %"
            rows.append((name, [str(len(groups)), share, *("-" if n is None else f"{n:.4g}" for n in numbers)]))
        return header, rows

    def _lines(self) -> Iterator[tuple[str, str]]:
        data, told = self.dataset, self.as_json()
        counted = f"{told['groups']} groups, {told['images']} images, {told['prompts']} prompts"
        yield "dataset", f"{data.folder}: {counted} in {len(data.files)} files, {readable_bytes(self.size)}"
        if data.identity:
            yield from _made_with(data.identity)
        shapes = ", ".join(f"{count} × {list(shape)}" for shape, count in self.shapes().items())
        yield "latents", f"{shapes or 'none'} float32"
        if told["adapters"] == 1:
            yield "drawn by", f"one adapter ({short(self.groups[0].checksum)})"
        elif self.groups:
            versions, lag = list(self.versions()), f"{told['lag']['mean']:.1f} behind the newest on average"
            yield "drawn by", f"{told['adapters']} adapters, versions {versions[0]} to {versions[-1]}, {lag}"
        left_out = ", ".join(f"{reason} {count}" for reason, count in sorted(data.skipped.items()))
        yield "left out", left_out or "nothing"
        yield from _first("corrupt", [str(problem) for problem in self.corrupt])
        same = [f"tickets {', '.join(map(str, tickets))} have identical latents" for tickets in self.copies]
        yield from _first("copies", same)
        yield from _first("does not fit", list(self.misfits))

    def _unread(self) -> list[Problem]:
        return [problem for problem in self.corrupt if problem not in self.dataset.problems]


def examine(folder: str | Path, recipe: Recipe | None = None) -> DataReport:
    """Read a dataset from end to end. `recipe`: also say whether it can be used with it.

    Raises:
        DatasetError: there is no dataset.
        ModelError: the recipe's model is not there.
    """
    if recipe is not None:
        check_model(recipe)
    dataset = GroupDataset.open(folder, strict=False)
    groups: list[Facts] = []
    corrupt = [problem for problem in dataset.problems if problem.reason in CORRUPT]
    for found in _read_all(dataset):
        if isinstance(found, Problem):
            corrupt.append(found)
        else:
            groups.append(_facts(found))
    tickets: defaultdict[bytes, list[int]] = defaultdict(list)
    for group in sorted(groups, key=lambda group: group.ticket):
        tickets[group.digest].append(group.ticket)
    return DataReport(
        dataset=dataset,
        groups=tuple(sorted(groups, key=lambda group: group.ticket)),
        corrupt=tuple(corrupt),
        copies=tuple(tuple(same) for same in tickets.values() if len(same) > 1),
        misfits=() if recipe is None else tuple(str(error) for error in misfits(dataset, recipe)),
        size=sum(file.stat().st_size for file in dataset.folder.glob(PARTS)),
    )


def figures(groups: Sequence[Facts]) -> dict[str, Any]:
    """Mean and spread of the rewards of these groups (null without any): over all images, and inside the groups; means
    of the parts.
    """
    if not groups:
        return {"groups": 0, "reward_mean": None, "reward_std": None, "std_in_groups": None, "parts": {}}
    rewards = np.concatenate([group.reward for group in groups])
    names = sorted({name for group in groups for name in group.parts})
    return {
        "groups": len(groups),
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "std_in_groups": float(np.mean([group.reward.std() for group in groups])),
        "parts": {
            name: float(np.concatenate([g.parts[name] for g in groups if name in g.parts]).mean()) for name in names
        },
    }


def _read_all(dataset: GroupDataset) -> Iterator[OfflineGroup | Problem]:
    """Every usable group, or what is wrong with it, in the order in which they lie on disk."""
    refs = sorted(dataset.rows, key=lambda ref: (ref.part, ref.row))
    for start in range(0, len(refs), _AT_ONCE):
        chosen = refs[start : start + _AT_ONCE]
        try:
            yield from dataset.read(chosen)
        except DatasetError:
            yield from (_read_one(dataset, ref) for ref in chosen)


def _read_one(dataset: GroupDataset, ref: RowRef) -> OfflineGroup | Problem:
    try:
        return dataset.read([ref])[0]
    except DatasetError as error:
        return Problem(dataset.files[ref.part], ref.row, "corrupt", error.problem.removeprefix(f"row {ref.row}: "))


def _facts(group: OfflineGroup) -> Facts:
    latents = group.final_latents
    digest = hashlib.blake2b(latents.tobytes(), digest_size=16).digest()
    about = (group.ticket, group.prompt, group.prompt_class, group.version, group.checksum)
    return Facts(*about, group.reward, group.parts, latents.shape, digest)


def _made_with(identity: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    model = (f"{key} {short(identity[key])}" for key in ("denoiser", "vae", "text_encoders") if key in identity)
    yield "made by", f"raysteer {identity.get('source')} {identity.get('run')}, reward {short(identity.get('reward'))}"
    yield "model", f"{identity.get('family')}, {', '.join(model)}, {identity.get('resolution')} pixels"
    sampling = identity.get("sampling")
    if isinstance(sampling, Mapping):
        how = "deterministic" if sampling.get("deterministic") else "stochastic"
        yield "drawn in", f"{sampling.get('steps')} {how} steps, guidance {sampling.get('guidance_scale')}"


def _first(label: str, texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    for index, text in enumerate(texts[:_SHOWN]):
        yield ("" if index else label), text
    if len(texts) > _SHOWN:
        yield "", f"and {len(texts) - _SHOWN} more (--json has all)"
