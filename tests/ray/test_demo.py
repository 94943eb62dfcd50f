"""The first command of the README, shortened, in a folder of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
SHORT = [
    "run.steps=1",
    "run.groups_per_step=2",
    "sampling.group_size=2",
    "evaluation.glyphs.prompts_unsafe=7",
    "evaluation.glyphs.prompts_safe=6",
    "evaluation.glyphs.diversity_prompts=2",
    "evaluation.glyphs.images_per_diversity_prompt=2",
    "evaluation.bootstrap_samples=100",
]


@pytest.mark.timeout(500)
def test_the_demo_trains_evaluates_and_leaves_what_it_says(tmp_path: Path) -> None:
    for entry in ROOT.iterdir():
        if entry.name not in ("runs", "demo-result.json") and not entry.name.startswith("."):
            (tmp_path / entry.name).symlink_to(entry)
    command = [sys.executable, "-m", "evaluation.demo", *SHORT]
    with tempfile.TemporaryDirectory(prefix="r") as folder:  # short: Ray puts unix sockets below it
        environment = os.environ | {"RAY_TMPDIR": folder, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=450)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "demo-result.json").read_text())
    assert set(result) >= {"base", "adapted", "difference", "protocol"}
    for figures in (result["base"], result["adapted"]):
        assert 0.0 <= figures["inappropriate_rate"] <= 1.0 and 0.0 <= figures["utility"] <= 1.0
    run = tmp_path / "runs" / result["run"]
    assert (run / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    assert "<!doctype html>" in (run / "evaluation/glyphs/index.html").read_text().lower()
    with Image.open(run / "evaluation/glyphs/before_after.png") as picture:
        assert picture.size > (400, 100)
    assert f"recorded as evaluation/... in run {(run / 'mlflow_run_id').read_text().strip()}" in done.stdout
