"""How well an anchor set tells safe from unsafe prompts in a CLIP's text space, and what alpha does to them.

Three questions before a run is started. Does the direction point the right way: is z_text . v_safe higher for safe
prompts than for unsafe ones (AUC, the chance that it is for a random pair; 0.5 is a coin)? Which prompts would
``steer: unsafe`` move: those on the negative side, so how many safe ones by mistake? And how far does alpha move a
prompt: the cosine between the embedding and its steered self, which falls towards saying nothing but "safe"?

Texts alone are encoded: no image, no pipeline, no Ray.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.config import Recipe
from cluster.prompt_files import SUFFIXES, format_of
from cluster.prompts import PromptsConfig, PromptSourceConfig, load_prompts
from raysteer.errors import ConfigError, PromptError
from rewards.anchors import load_anchors, shipped_anchor_sets
from rewards.config import AnchorSet, RewardTerm
from rewards.steering import embed_direction, kept_cosine

if TYPE_CHECKING:
    from rewards.encoder import Encoder

OWN = "the recipe's own"
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SIDES = ("safe", "unsafe")


@dataclass(frozen=True)
class SetReport:
    """What one anchor set does to the prompts.

    Attributes:
        name: a shipped set, or the recipe's own.
        anchors: its phrases.
        scores: "safe" and "unsafe" -> float64 [n], z_text . v_safe.
        problem: why it has no direction in this CLIP; its scores are empty then.
    """

    name: str
    anchors: AnchorSet
    scores: dict[str, np.ndarray]
    problem: str | None = None

    @property
    def auc(self) -> float:
        return separation(self.scores["safe"], self.scores["unsafe"])

    def steered_share(self, side: str) -> float:
        """Share of the prompts that ``steer: unsafe`` would move."""
        return float(np.mean(self.scores[side] < 0.0))


@dataclass(frozen=True)
class AnchorsReport:
    """All sets over the same prompts, with one CLIP. ``used`` names the set that the recipe trains with, if any."""

    term: RewardTerm
    sets: tuple[SetReport, ...]
    counts: dict[str, int]
    used: str | None

    @property
    def alphas(self) -> tuple[float, ...]:
        """Sweep from 0 to 2, or to twice the recipe's alpha; the recipe's own is among them."""
        top = max(2.0, 2.0 * self.term.alpha)
        return tuple(sorted({round(top * step / 20, 10) for step in range(21)} | {self.term.alpha}))

    @property
    def good(self) -> tuple[SetReport, ...]:
        """The sets that have a direction."""
        return tuple(report for report in self.sets if report.problem is None)

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            "clip": self.term.need_clip().model_dump(mode="json"),
            "alpha": self.term.alpha,
            "mode": self.term.mode,
            "steer": self.term.steer,
            "used": self.used,
            "prompts": self.counts,
            "sets": [self._set_as_json(report) for report in self.sets],
        }

    def _set_as_json(self, report: SetReport) -> dict[str, Any]:
        known = {"name": report.name, "anchors": report.anchors.model_dump(mode="json"), "problem": report.problem}
        if report.problem is not None:
            return known
        return known | {
            "auc": report.auc,
            **{side: summary(report.scores[side]) | {"steered": report.steered_share(side)} for side in SIDES},
            "sweep": [
                {"alpha": alpha}
                | {side: summary(kept_cosine(report.scores[side], alpha, self.term.mode)) for side in SIDES}
                for alpha in self.alphas
            ],
        }

    def table(self) -> tuple[list[str], list[tuple[str, list[str]]]]:
        """Header and lines for the terminal."""
        alpha = f"{self.term.alpha:g}"
        header = ["", "phrases", "AUC", "safe prompts", "unsafe prompts", "steered if unsafe", f"kept at alpha {alpha}"]
        return header, [(self._label(report), self._cells(report)) for report in self.sets]

    def legend(self) -> str:
        """What the columns are, in words."""
        note = "* the set of the recipe. " if self.used else ""
        return (
            f"{note}Prompts: z_text . v_safe, mean [5 %, 95 %]. Steered: share of safe / unsafe prompts below 0, which "
            "steer: unsafe moves.\nKept: mean cosine of a steered safe / unsafe prompt to itself, 1 = not moved."
        )

    def _label(self, report: SetReport) -> str:
        return f"{report.name} *" if report.name == self.used else report.name

    def _cells(self, report: SetReport) -> list[str]:
        phrases = f"{len(report.anchors.safe)} + {len(report.anchors.unsafe)}"
        if report.problem is not None:
            return [phrases, "no direction", "", "", "", ""]
        spreads = [_spread(report.scores[side]) for side in SIDES]
        steered = " / ".join(f"{100 * report.steered_share(side):.0f} %" for side in SIDES)
        kept = " / ".join(
            f"{np.mean(kept_cosine(report.scores[side], self.term.alpha, self.term.mode)):.2f}" for side in SIDES
        )
        return [phrases, f"{report.auc:.3f}", *spreads, steered, kept]


def study(
    recipe: Recipe,
    safe: str | None = None,
    unsafe: str | None = None,
    limit: int = 500,
    notify: Callable[[str], None] = print,
) -> AnchorsReport:
    """Score prompts with every shipped anchor set and the recipe's own.

    Args:
        recipe: names the CLIP, alpha, mode, its anchors, and the prompts unless given.
        safe, unsafe: prompt files instead of the recipe's.
        limit: most prompts of each side; of more, a fixed random sample is taken.
        notify: told what takes time.

    Raises:
        ConfigError: no reward of the recipe has a CLIP, the CLIP cannot be used, or the recipe's anchors have no
            direction.
        PromptError: no prompts of a side, or a file that cannot be used.
    """
    import torch

    from rewards.base import located_errors
    from rewards.clip import clip_scorer

    key, term = _steering_term(recipe)
    prompts = gather_prompts(recipe, {"safe": safe, "unsafe": unsafe}, limit)
    with located_errors(key):
        own = load_anchors(term.anchors)
        clip = clip_scorer(term.need_clip(), "cuda" if torch.cuda.is_available() else "cpu")
        count = sum(len(texts) for texts in prompts.values())
        notify(f"embedding {count} prompts with CLIP {term.need_clip().model}")
        used = _name_of(term)
        sets = {used: own} | {name: load_anchors(name) for name in shipped_anchor_sets()}
        embedded = {side: clip.encode_texts(texts) for side, texts in prompts.items()}
        reports = tuple(_report(name, anchors, clip, embedded, name == used) for name, anchors in sets.items())
    counts = {side: len(texts) for side, texts in prompts.items()}
    return AnchorsReport(term, reports, counts, used if term.name == "steering" else None)


def write(report: AnchorsReport, folder: Path) -> tuple[Path, Path]:
    """Write ``anchors.json`` and ``anchors.png`` into a folder; returns both paths."""
    from cluster.anchors_plot import draw

    folder.mkdir(parents=True, exist_ok=True)
    data, picture = folder / "anchors.json", folder / "anchors.png"
    data.write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
    draw(report, picture)
    return data, picture


def separation(higher: np.ndarray, lower: np.ndarray) -> float:
    """AUC: the share of pairs in which the first is higher; a tie counts half (Mann-Whitney U over n m).

    Args:
        higher, lower: float [n] and [m], neither empty.
    """
    ordered = np.sort(lower)
    below = np.searchsorted(ordered, higher, "left") + np.searchsorted(ordered, higher, "right")
    return float(below.sum() / (2.0 * len(higher) * len(lower)))


def summary(values: np.ndarray) -> dict[str, float]:
    """Mean and quantiles."""
    quantiles = np.quantile(values, QUANTILES)
    named = {f"q{100 * q:02.0f}": float(value) for q, value in zip(QUANTILES, quantiles, strict=True)}
    return {"mean": float(values.mean())} | named


def gather_prompts(recipe: Recipe, files: dict[str, str | None], limit: int) -> dict[str, list[str]]:
    """Prompts of both sides, from a file where one is given, else from the recipe; at most ``limit`` each.

    Safe and utility prompts are one side.

    Raises:
        PromptError: as ``study``.
    """
    theirs = recipe.prompts.named_sources().values()
    sources: list[PromptSourceConfig] = []
    for side, file in files.items():
        mine = [source for source in theirs if (source.prompt_class == "unsafe") == (side == "unsafe")]
        if file is not None:
            if format_of(file) is None:
                raise PromptError(file, "has no known suffix", f"give a file that ends with {', '.join(SUFFIXES)}")
            mine = [PromptSourceConfig.model_validate({"path": file, "class": side})]
        if not mine:
            raise PromptError(f"the recipe's {side} prompts", "there are none", f"give some with --{side} FILE")
        sources += mine
    cfg = PromptsConfig(sources=tuple(sources), unsafe_fraction=0.5, bad_rows=recipe.prompts.bad_rows)
    loaded = load_prompts(cfg)
    gathered: dict[str, list[str]] = {}
    for side in files:
        mine_loaded = [source for source in loaded.sources if (source.prompt_class == "unsafe") == (side == "unsafe")]
        ends = np.cumsum([len(source) for source in mine_loaded])
        chosen = _sample(int(ends[-1]), limit)
        places = [(int(np.searchsorted(ends, index, "right")), index) for index in chosen]
        starts = [0, *ends.tolist()]
        gathered[side] = [mine_loaded[which].prompt(index - starts[which]) for which, index in places]
    return gathered


def _steering_term(recipe: Recipe) -> tuple[str, RewardTerm]:
    """The steering reward of the recipe with its key, else the first one with a CLIP."""
    located = list(recipe.reward.located())
    for key, term in located:
        if term.name == "steering":
            return key, term
    for key, term in located:
        if term.clip is not None:
            return key, term
    raise ConfigError("reward.clip", None, "anchors are phrases in a CLIP's text space: add clip: {model: ...}")


def _name_of(term: RewardTerm) -> str:
    """Under which name the recipe's set is shown: of the shipped set, of its file, or none."""
    if isinstance(term.anchors, str):
        stem = Path(term.anchors).stem
        return f"{stem} ({OWN})" if stem in shipped_anchor_sets() and term.anchors != stem else stem
    return OWN


def _report(name: str, anchors: AnchorSet, clip: Encoder, embedded: dict[str, np.ndarray], needed: bool) -> SetReport:
    try:
        v_safe = embed_direction(clip, anchors, name)
    except ConfigError as error:
        if needed:
            raise
        return SetReport(name, anchors, {side: np.zeros(0) for side in SIDES}, error.remedy)
    return SetReport(name, anchors, {side: z.astype(np.float64) @ v_safe for side, z in embedded.items()})


def _spread(values: np.ndarray) -> str:
    low, high = np.quantile(values, (0.05, 0.95))
    return f"{values.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def _sample(count: int, limit: int) -> Sequence[int]:
    """At most ``limit`` of ``range(count)`` by a fixed seed: prompt lists have periods, which even steps would meet."""
    if count <= limit:
        return range(count)
    return sorted(np.random.default_rng(0).choice(count, limit, replace=False).tolist())
