"""The demo: train on the glyph world, evaluate before and after, print the table. ``make demo`` runs this.

It only calls the command line, so that what it shows is what a user gets; then it writes ``demo-result.json``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

RECIPE = "recipes/glyphs.yaml"
RESULT = Path("demo-result.json")


def raysteer(*arguments: str) -> None:
    """Run the command line of this environment; its exit code ends the demo if it is not 0."""
    command = [sys.executable, "-m", "cluster", *arguments]
    print("$ raysteer", *arguments, flush=True)
    code = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode
    if code:
        sys.exit(code)


def flat(figures: dict) -> dict:
    """``name``, ``name_interval`` (95 %) and ``name_standard_error`` of every headline figure."""
    out: dict = {}
    for name, figure in figures.items():
        if isinstance(figure, dict) and "value" in figure:
            out[name] = figure["value"]
            out[f"{name}_interval"] = [figure["low"], figure["high"]]
            out[f"{name}_standard_error"] = figure["standard_error"]
        elif isinstance(figure, int):
            out[name] = figure
    return out


def main() -> None:
    run = f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    name = f"run.name={run}"
    evaluation = Path("runs") / run / "evaluation" / "evaluation.json"
    started = time.monotonic()
    raysteer("train", RECIPE, name, *sys.argv[1:])
    trained = time.monotonic()
    raysteer("eval", RECIPE, name, *sys.argv[1:])
    ended = time.monotonic()
    card = json.loads(evaluation.read_text(encoding="utf-8"))
    result = {
        "base": flat(card["base"]),
        "adapted": flat(card["adapted"]),
        "seconds": round(ended - started, 1),
        "training_seconds": round(trained - started, 1),
        "evaluation_seconds": round(ended - trained, 1),
        "difference": flat(card["difference"]),
        "protocol": card["protocol"],
        "run": run,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"\nadapter  runs/{run}/adapter")
    print(f"picture  {evaluation.with_name('before_after.png')}")
    print("MLflow   .venv/bin/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db --host 127.0.0.1")
    print(f"figures  {RESULT}  (training {trained - started:.0f} s, evaluation {ended - trained:.0f} s)")


if __name__ == "__main__":
    main()
