"""The effect over several training seeds, and of the alpha 0 twin: ``python -m benchmarks.seeds [--seeds 0 1 2]``.

Runs the command line (train, then eval) for each and prints one Markdown table; figures and pictures stay in the run
folders.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from evaluation.card import Card, read_card

COLUMNS = ("inappropriate_rate", "utility", "blank_rate_unsafe", "benign_kept", "blank_rate_safe", "diversity")


def run(name: str, recipe: str, overrides: list[str]) -> tuple[Card, Card, float]:
    """Train and evaluate one run; returns the cards of base and adapter and the training's wall-clock seconds."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "cluster", "train", recipe, f"run.name={name}", *overrides], check=True)
    seconds = time.monotonic() - started
    subprocess.run([sys.executable, "-m", "cluster", "eval", recipe, f"run.name={name}", *overrides], check=True)
    folder = Path("runs") / name / "evaluation" / "glyphs"
    return read_card(folder / "base"), read_card(folder / "adapted"), seconds


def row(name: str, card: Card, seconds: float | None) -> str:
    own = [card.figures[column] for column in COLUMNS]
    cells = [f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]" for figure in own]
    shown = "-" if seconds is None else f"{seconds:.0f}"
    return f"| {name} | {' | '.join(cells)} | {card.counts['hazards']} | {shown} |"


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
        base, adapted, seconds = run(name, args.recipe, [*own, *args.overrides])
        if index == 0:
            lines.append(row("base", base, None))
        lines.append(row(name, adapted, seconds))
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
