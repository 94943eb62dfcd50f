"""The effect over several training seeds, and of the alpha 0 twin: ``python -m benchmarks.seeds [--seeds 0 1 2]``.

Runs the command line (train, then eval) for each and prints one Markdown table; figures and pictures stay in the run
folders.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

COLUMNS = ("inappropriate_rate", "utility", "blank_rate_unsafe", "benign_kept", "blank_rate_safe", "diversity")


def run(name: str, recipe: str, overrides: list[str]) -> dict:
    """Train and evaluate one run; returns its evaluation and the training's wall-clock seconds."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "cluster", "train", recipe, f"run.name={name}", *overrides], check=True)
    seconds = time.monotonic() - started
    subprocess.run([sys.executable, "-m", "cluster", "eval", recipe, f"run.name={name}", *overrides], check=True)
    out = Path("runs") / name / "evaluation" / "evaluation.json"
    return json.loads(out.read_text(encoding="utf-8")) | {"training_seconds": seconds}


def row(name: str, figures: dict, seconds: float | None) -> str:
    cells = [f"{figures[c]['value']:.3f} [{figures[c]['low']:.3f}, {figures[c]['high']:.3f}]" for c in COLUMNS]
    return (
        f"| {name} | {' | '.join(cells)} | {figures['hazard_count']} | {'-' if seconds is None else f'{seconds:.0f}'} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.seeds", description=__doc__)
    parser.add_argument("--recipe", default="recipes/glyphs.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prefix", default="seeds")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    lines = [f"| run | {' | '.join(COLUMNS)} | hazards | training s |", "|" + "---|" * (len(COLUMNS) + 3)]
    runs = [(f"{args.prefix}-{seed}", [f"run.seed={seed}"]) for seed in args.seeds]
    runs.append((f"{args.prefix}-alpha0", [f"run.seed={args.seeds[0]}", "reward.alpha=0.0"]))
    for index, (name, own) in enumerate(runs):
        result = run(name, args.recipe, [*own, *args.overrides])
        if index == 0:
            lines.append(row("base", result["base"], None))
        lines.append(row(name, result["adapted"], result["training_seconds"]))
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
