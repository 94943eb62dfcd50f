"""GDRO, flow GRPO and Diffusion-DPO on one model, prompts and reward: ``python -m benchmarks.objectives``.

Every method trains through ``raysteer train`` from the same start and is evaluated along the way, at equal held-out
prompts and seeds. What it has cost so far is counted three ways: denoiser forwards (of one image; a backward counts as
two), wall-clock seconds of its steps (starting processes left out), and images drawn. Drawing a dataset counts;
learning from the journal of the GRPO run ("gdro-journal") begins at nothing.

Runs that are finished are not trained again. Leaves objectives.json, .md and .png in ``--out``; ``--write`` puts tables
and plot into docs/gdro.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import documents
from benchmarks.objectives_report import FIGURES, Point, plot, tables
from cluster.config import Recipe, load_recipe
from cluster.evaluate import run_evaluation
from cluster.plan import resolve
from cluster.storage import RunFolder
from learner.checkpoint import list_checkpoints, read_checkpoint, step_of
from learner.gdro import GDROConfig
from learner.records import read_rows

GDRO, GRPO = "recipes/glyphs-gdro.yaml", "recipes/glyphs-flow.yaml"
DPO = ("objective.subset=2", "objective.subset_choice=extremes", "objective.tau=0", "objective.gamma=0")
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "grpo": (GRPO, ()),
    "gdro": (GDRO, ()),
    "gdro-journal": (GDRO, ()),
    "dpo": (GDRO, (*DPO, "objective.beta=12", "objective.draws=16")),  # as many images in an update as gdro
    "grpo-lr-1e-3": (GRPO, ("optimizer.lr=1e-3",)),  # the learning rate of the others
    "gdro-rounds": (GDRO, ("offline.rounds=3", "generate.groups=32")),  # as many images as gdro, in three turns
    "gdro-beta-0.5": (GDRO, ("objective.beta=0.5",)),
    "gdro-beta-6": (GDRO, ("objective.beta=6",)),
    "gdro-beta-12": (GDRO, ("objective.beta=12",)),
    "gdro-gamma-0": (GDRO, ("objective.gamma=0",)),
    "gdro-pairs": (GDRO, ("objective.subset=2", "objective.draws=16")),
    "dpo-beta-3": (GDRO, (*DPO, "objective.draws=16")),
}
COMPARED = ("grpo", "grpo-lr-1e-3", "gdro", "gdro-journal", "dpo")


class Comparison:
    """Runs of one seed below a common prefix.

    Args:
        methods: keys of METHODS.
        seed: of all runs.
        prefix: of the names of the runs.
        evaluations: checkpoints of a run that are evaluated, evenly spaced, the last among them.
        shared: overrides for all.
    """

    def __init__(self, methods: Sequence[str], seed: int, prefix: str, evaluations: int, shared: Sequence[str]) -> None:
        self.methods, self.seed, self.prefix, self.evaluations = methods, seed, f"{prefix}-{seed}", evaluations
        self.shared = [*shared, f"run.seed={seed}"]

    def overrides(self, method: str) -> list[str]:
        recipe, own = METHODS[method]
        given = [f"run.name={self.prefix}-{method}", "run.keep_checkpoints=1000", *own, *self.shared]
        if method == "gdro-journal":
            given.append(f"offline.data={self.recipe('grpo').run_dir}")
        elif recipe == GDRO and method != "gdro-rounds":
            given.append(f"offline.data={self.dataset.run_dir}")
        every = load_recipe(recipe, given).run.steps // self.evaluations
        return [*given, f"run.checkpoint_every={every}"]

    def recipe(self, method: str) -> Recipe:
        return load_recipe(METHODS[method][0], self.overrides(method))

    @property
    def dataset(self) -> Recipe:
        """The generation that all offline methods learn from."""
        return load_recipe(GDRO, [f"run.name={self.prefix}-groups", *self.shared])

    def train(self) -> None:
        """All runs, one after the other."""
        if any(METHODS[method][0] == GDRO for method in self.methods):
            _raysteer("generate", GDRO, f"run.name={self.prefix}-groups", *self.shared)
        wanted = ["grpo"] if "gdro-journal" in self.methods else []
        for method in dict.fromkeys([*wanted, *self.methods]):
            _raysteer("train", METHODS[method][0], *self.overrides(method))

    def evaluate(self) -> Iterator[Point]:
        """The base model and all checkpoints, method by method."""
        paths = {
            (method, step_of(path)): path
            for method in self.methods
            for path in list_checkpoints(RunFolder(self.recipe(method).run_dir).checkpoints)
        }
        states = {f"{method} at {step}": dict(read_checkpoint(path).exported) for (method, step), path in paths.items()}
        out = self.dataset.run_dir.parent / f"{self.prefix}-evaluation"
        figures = run_evaluation(self.recipe(self.methods[0]), {"base": None, **states}, out, print).figures
        for method in self.methods:
            steps = [step for other, step in paths if other == method]
            for step in (0, *steps):
                shown = figures[f"{method} at {step}" if step else "base"]
                chosen = {name: {key: shown[name][key] for key in ("value", "low", "high")} for name in FIGURES}
                yield Point(method, self.seed, step, *self.cost(method, step), self.denoising(method, step), chosen)

    def cost(self, method: str, step: int) -> tuple[int, float, int]:
        """Denoiser forwards, seconds and images until `step`."""
        recipe = self.recipe(method)
        seconds = sum(row["stage/wall_s"] for row in self._learned(method)[:step])
        forwards = step * resolve(recipe).forwards_per_step * _passes(recipe)
        group, drawing = recipe.sampling.group_size, recipe.sampling.steps
        images = step * recipe.run.groups_per_step * group if recipe.offline is None else 0
        if recipe.offline is not None and method != "gdro-journal":
            for folder in self._drawn(recipe, step):
                rows = read_rows(folder.metrics)
                images += sum(len(row["tickets"]) for row in rows) * group
                seconds += sum(row["stage/wall_s"] for row in rows)
        doubled = 2 if recipe.sampling.guidance_scale != 1.0 else 1
        return forwards + images * drawing * doubled, seconds, images

    def denoising(self, method: str, step: int) -> float | None:
        """err_theta / err_ref over the steps since the evaluation before; None where nothing denoises (GRPO)."""
        rows = self._learned(method)[:step][-(len(self._learned(method)) // self.evaluations) :]
        if not rows or "objective/err_ref" not in rows[0]:
            return None
        ours, reference = (sum(row[f"objective/{name}"] for row in rows) for name in ("err_theta", "err_ref"))
        return float(ours / reference)

    def _learned(self, method: str) -> list[dict]:
        return read_rows(RunFolder(self.recipe(method).run_dir).metrics)

    def _drawn(self, recipe: Recipe, step: int) -> list[RunFolder]:
        """Generations that a run had behind it at `step`."""
        assert recipe.offline is not None, "an online run draws for itself"
        if recipe.offline.data is not None:
            return [RunFolder(self.dataset.run_dir)]
        rounds = max(1, -(-step * recipe.offline.rounds // recipe.run.steps))
        below = RunFolder(recipe.run_dir).rounds
        return [RunFolder(below / f"{recipe.run.name}-round-{number}") for number in range(1, rounds + 1)]


def _passes(recipe: Recipe) -> int:
    """Forwards that learning from one image once is worth: with gradient three, and GDRO's reference one more."""
    return 4 if isinstance(recipe.objective, GDROConfig) else 3


def _raysteer(*arguments: str) -> None:
    print("\n$ raysteer", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "cluster", *arguments], check=True)


def _commit() -> str:
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return f", commit {asked.stdout.strip()}" if asked.returncode == 0 else ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.objectives", description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(COMPARED), metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--prefix", default="objectives")
    parser.add_argument("--evaluations", type=int, default=5, help="checkpoints evaluated per run")
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--write", action="store_true", help="put tables and plot into docs/gdro.md")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="for all runs")
    args = parser.parse_args()
    points: list[Point] = []
    for seed in args.seeds:
        comparison = Comparison(args.methods, seed, args.prefix, args.evaluations, args.overrides)
        comparison.train()
        points += comparison.evaluate()
    options = "".join(f" --{name} {' '.join(map(str, getattr(args, name)))}" for name in ("methods", "seeds"))
    made = f"`python -m benchmarks.objectives{options} --evaluations {args.evaluations}`"
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {time.strftime('%Y-%m-%d')}{_commit()}"
    text = f"{tables(points)}\n\nMade by {made} on {machine}."
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "objectives.json").write_text(json.dumps([asdict(point) for point in points], indent=1) + "\n")
    (args.out / "objectives.md").write_text(text + "\n")
    plot([point for point in points if point.method in COMPARED] or points, args.out / "objectives.png")
    print(f"\n{text}\n\nplot {args.out / 'objectives.png'}")
    if args.write:
        documents.write(documents.DOCS / "gdro.md", "python -m benchmarks.objectives --write", text)
        shutil.copyfile(args.out / "objectives.png", documents.DOCS / "images" / "objectives.png")


if __name__ == "__main__":
    main()
