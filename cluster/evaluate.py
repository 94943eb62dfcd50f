"""Evaluate a recipe's model with and without adapters, on the same sampler actors that training uses.

Images are drawn in fixed chunks, whoever draws them, so the figures do not depend on the number of samplers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raysteer.calls import plain
from raysteer.errors import ConfigError, DeadlineExceeded, UserError

if TYPE_CHECKING:
    from cluster.config import Recipe
    from diffusion.adapters import AdapterState
    from evaluation.glyphs import PromptSet, Report
    from evaluation.scored import ImageScores

CHUNK_TIMEOUT_S = SCORE_TIMEOUT_S = 600.0
PICTURE_SAFE = 6
HEADLINE = (
    ("inappropriate_rate", "inappropriate rate (unsafe prompts)"),
    ("utility", "utility (mean of six tasks)"),
    ("blank_rate_unsafe", "blank rate (unsafe prompts)"),
    ("benign_kept", "benign object kept (unsafe prompts)"),
    ("blank_rate_safe", "blank rate (safe prompts)"),
    ("inappropriate_rate_safe", "inappropriate rate (safe prompts)"),
    ("diversity", "diversity"),
    ("reward", "reward (raw)"),
    ("reward_corrected", "reward (corrected: gains the judge approves)"),
)


@dataclass(frozen=True)
class Evaluation:
    """Reports of every model by label, and where the files are."""

    reports: dict[str, Report]
    difference: dict[str, dict]
    protocol: dict[str, Any]
    seconds: float
    json_path: Path
    picture: Path

    @property
    def figures(self) -> dict[str, dict]:
        """As written to ``evaluation.json``: rounded, by label."""
        return {label: report.as_dict() for label, report in self.reports.items()}

    def table(self) -> str:
        """The headline figures as plain text, with 95 % bootstrap intervals."""
        figures = self.figures
        labels = list(figures)
        names = [(key, name) for key, name in HEADLINE if key in figures[labels[0]]]
        width = max(len(name) for _, name in names)
        lines = ["".join([" " * width, *(f"  {label:>22}" for label in labels)])]
        for key, name in names:
            cells = [figures[label][key] for label in labels]
            lines.append(
                f"{name:<{width}}" + "".join(f"  {c['value']:>6.3f} [{c['low']:.3f}, {c['high']:.3f}]" for c in cells)
            )
        lines.append(
            f"{'hazards counted':<{width}}" + "".join(f"  {figures[label]['hazard_count']:>22d}" for label in labels)
        )
        return "\n".join(lines)


def run_evaluation(
    recipe: Recipe,
    adapters: Mapping[str, AdapterState | None],
    out: Path,
    notify: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Evaluate ``adapters`` (label to state, None for the base model) and write figures and picture.

    Starts Ray if it does not run yet, and its own samplers, which it ends. Raises ConfigError when the recipe names no
    suite, UserError for an adapter that does not fit the model, DeadlineExceeded when a sampler does not answer.
    """
    from cluster.runtime import init_ray
    from evaluation import glyphs, scored

    config = recipe.evaluation
    if config.suite is None:
        raise ConfigError("evaluation.suite", None, "set it to glyphs (or pass evaluation.suite=glyphs)")
    base = next((label for label, state in adapters.items() if state is None), None)
    started = time.monotonic()
    samplers = recipe.samplers
    ray = init_ray(recipe.cluster, samplers.fewest * samplers.num_cpus, samplers.fewest * samplers.num_gpus)
    prompts = glyphs.prompt_set(config)
    pool = _SamplerPool(ray, recipe)
    try:
        images: dict[str, np.ndarray] = {}
        # The base model first: a fresh sampler carries an adapter that changes nothing.
        for label in sorted(adapters, key=lambda name: adapters[name] is not None):
            notify(f"evaluating {label}: {len(prompts.prompts)} images on {recipe.samplers.fewest} samplers")
            images[label] = pool.generate(prompts.prompts, prompts.seeds, adapters[label])
    finally:
        pool.close()
    scores: dict[str, ImageScores] = {}
    if config.reward:
        notify("scoring the images with the recipe's reward")
        scores = _score(ray, recipe, [*prompts.unsafe, *prompts.safe], images)
    reference = None if base not in scores else scores[base].reward
    reports = {label: scored.report(prompts, images[label], config, scores.get(label), reference) for label in adapters}
    return _write(recipe, reports, images, prompts, out, time.monotonic() - started)


class _SamplerPool:
    """Sampler actors that draw chunks of prompts."""

    def __init__(self, ray: Any, recipe: Recipe) -> None:
        from actors.sampler import Sampler

        self.ray, self.config = ray, recipe.evaluation
        options = {"num_cpus": recipe.samplers.num_cpus, "num_gpus": recipe.samplers.num_gpus}
        actor = ray.remote(**options)(Sampler)
        self.actors = [
            actor.remote(f"evaluation-{index}", recipe.model, None, recipe.samplers.device)
            for index in range(recipe.samplers.fewest)
        ]

    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int], state: Mapping[str, np.ndarray] | None
    ) -> np.ndarray:
        """uint8 [n, H, W, 3]; chunks go to whichever sampler is free."""
        from evaluation.scored import CHUNK, chunks

        adapter = None if state is None else self.ray.put(dict(state))
        waiting = list(enumerate(chunks(len(prompts))))
        count = len(waiting)
        running: dict[Any, tuple[int, Any]] = {}
        done: dict[int, np.ndarray] = {}
        idle = list(self.actors)
        while waiting or running:
            while waiting and idle:
                index, chunk = waiting.pop(0)
                actor = idle.pop()
                ref = actor.generate.remote(
                    list(prompts[chunk]),
                    list(seeds[chunk]),
                    self.config.steps,
                    self.config.guidance_scale,
                    adapter,
                    CHUNK,
                )
                running[ref] = (index, actor)
            ready, _ = self.ray.wait(list(running), num_returns=1, timeout=CHUNK_TIMEOUT_S)
            if not ready:
                raise DeadlineExceeded("a sampler drawing evaluation images", CHUNK_TIMEOUT_S, "is its device hung?")
            index, actor = running.pop(ready[0])
            try:
                done[index] = self.ray.get(ready[0])
            except self.ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, UserError) else error) from None
            idle.append(actor)
        return np.concatenate([done[index] for index in range(count)])

    def close(self) -> None:
        for actor in self.actors:
            self.ray.kill(actor)


def _score(
    ray: Any, recipe: Recipe, prompts: Sequence[str], images: Mapping[str, np.ndarray]
) -> dict[str, ImageScores]:
    """Scores of the first images of every model, one for each prompt, by a scorer of its own.

    Raises:
        UserError: an image cannot be scored.
        DeadlineExceeded: the reward does not answer.
    """
    from actors.evaluator import Scorer
    from evaluation.scored import chunks, joined

    config, judge = recipe.reward_workers, recipe.evaluation.judge
    actor = ray.remote(num_cpus=config.num_cpus, num_gpus=config.num_gpus)(Scorer)
    scorer = actor.remote(recipe.reward, None if judge is None else judge.reward, config.device)
    found = {}
    try:
        for label, drawn in images.items():
            refs = [scorer.score.remote(drawn[chunk], prompts[chunk]) for chunk in chunks(len(prompts))]
            _, late = ray.wait(refs, num_returns=len(refs), timeout=SCORE_TIMEOUT_S)
            if late:
                waited_for = f"the scores of {len(late)} of {len(refs)} batches of images of {label}"
                raise DeadlineExceeded(waited_for, SCORE_TIMEOUT_S, "is the reward's device hung?")
            try:
                found[label] = joined(ray.get(refs))
            except ray.exceptions.RayError as error:
                raise plain(error) from None
    finally:
        ray.kill(scorer)
    return found


def _write(
    recipe: Recipe,
    reports: dict[str, Report],
    images: Mapping[str, np.ndarray],
    prompts: PromptSet,
    out: Path,
    seconds: float,
) -> Evaluation:
    from evaluation import glyphs
    from evaluation.picture import before_after

    labels = list(reports)
    difference: dict[str, dict] = {}
    if len(labels) > 1:
        change = glyphs.paired_difference(reports[labels[0]], reports[labels[-1]], recipe.evaluation)
        difference = {name: figure.as_dict() for name, figure in change.items()}
    protocol = glyphs.protocol(recipe.evaluation, prompts)
    scored_by = {}
    if recipe.evaluation.reward:
        judge = recipe.evaluation.judge
        scored_by = {
            "reward": recipe.reward.describe(),
            "judge": "detector" if judge is None else judge.reward.describe(),
        }
    out.mkdir(parents=True, exist_ok=True)
    document = {
        **{label: report.as_dict() for label, report in reports.items()},
        "difference": difference,
        "protocol": protocol,
        "scored_by": scored_by,
        "seconds": round(seconds, 1),
    }
    path = out / "evaluation.json"
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    # Not chosen ones: the first that ask for a mark alone, for a mark and an object, and for each task.
    n_unsafe = len(prompts.unsafe)
    unsafe = [i for i in (0, 1, 2, 7, 8, 9, 10) if i < n_unsafe]
    shown = unsafe + list(range(n_unsafe, n_unsafe + min(PICTURE_SAFE, len(prompts.safe))))
    picture = before_after(
        out / "before_after.png",
        {label: images[label][shown] for label in labels},
        [prompts.prompts[i] for i in shown],
        {label: glyphs.detector.inappropriate(images[label][shown]) > 0 for label in labels},
        len(unsafe),
        f"held-out prompts, equal seeds ({recipe.run.name})",
    )
    return Evaluation(reports, difference, protocol, seconds, path, picture)
