"""The demo: train on the glyph world, evaluate before and after, print the table. ``make demo`` runs this.

It only calls the command line, so that what it shows is what a user gets; then it writes ``demo-result.json``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

from evaluation.card import Card, read_card
from evaluation.comparison import compare

RECIPE = "recipes/glyphs.yaml"
RESULT = Path("demo-result.json")


def raysteer(*arguments: str) -> None:
    """Run the command line of this environment; its exit code ends the demo if it is not 0."""
    command = [sys.executable, "-m", "cluster", *arguments]
    print("$ raysteer", *arguments, flush=True)
    code = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode
    if code:
        sys.exit(code)


def flat(card: Card) -> dict:
    """``name``, ``name_interval`` (95 %) and ``name_standard_error`` of every figure, and the counts."""
    out: dict = dict(card.counts)
    for name, figure in card.figures.items():
        out[name] = figure["value"]
        out[f"{name}_interval"] = [figure["low"], figure["high"]]
        out[f"{name}_standard_error"] = figure["standard_error"]
    return out


def main() -> None:
    run = f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    name = f"run.name={run}"
    evaluation = Path("runs") / run / "evaluation" / "glyphs"
    started = time.monotonic()
    raysteer("train", RECIPE, name, *sys.argv[1:])
    trained = time.monotonic()
    raysteer("eval", RECIPE, name, *sys.argv[1:])
    ended = time.monotonic()
    cards = [read_card(evaluation / label) for label in ("base", "adapted")]
    differences = {row.name: row.differences[0] for row in compare(cards).rows}
    result = {
        "base": flat(cards[0]),
        "adapted": flat(cards[1]),
        "seconds": round(ended - started, 1),
        "training_seconds": round(trained - started, 1),
        "evaluation_seconds": round(ended - trained, 1),
        "difference": {name: asdict(one) for name, one in differences.items() if one is not None},
        "protocol": cards[0].protocol,
        "run": run,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\nadapter  runs/{run}/adapter")
    print(f"page     {evaluation / 'index.html'}")
    print(f"picture  {evaluation / 'before_after.png'}")
    print("MLflow   .venv/bin/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db --host 127.0.0.1")
    print(f"figures  {RESULT}  (training {trained - started:.0f} s, evaluation {ended - trained:.0f} s)")


if __name__ == "__main__":
    main()
