"""The real loop on a recipe, measured: ``python -m benchmarks.loop [RECIPE] [KEY=VALUE ...] [--json FILE]``.

Runs ``raysteer train`` in a process of its own, in a temporary storage, and reports throughput, seconds per stage,
idle share for each role, overlap, publish-to-applied latency and the peak memory of every process. The
first steps, in which processes still warm up, are left out of the medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from learner.records import read_rows

WARM_UP_STEPS = 3
POLL_S = 0.5

FIGURES = (
    ("throughput/images_per_s", "images trained per second"),
    ("stage/wall_s", "seconds per learner step"),
    ("stage/sample_s", "  sampling, per group"),
    ("stage/score_s", "  scoring, per group"),
    ("stage/score_latency_s", "  submitted to scored, per group"),
    ("stage/wait_s", "  learner waiting for the batch"),
    ("stage/fetch_s", "  learner fetching trajectories"),
    ("stage/learn_s", "  learning"),
    ("stage/publish_s", "  publishing the adapter"),
    ("stage/adapter_latency_s", "published to applied, per sampler"),
    ("overlap/reward_hidden", "share of reward time hidden"),
    ("overlap/sampling_while_learning", "share of learning with sampling beside it"),
    ("idle/samplers", "idle share, samplers"),
    ("idle/learner", "idle share, learner"),
    ("idle/reward_workers", "idle share, reward workers"),
    ("staleness/mean", "version lag, mean"),
)


def processes_below(root: int) -> dict[int, str]:
    """Process ids below ``root`` and their command lines (Linux)."""
    parents, names = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid = int(stat.parent.name)
            parents[pid] = int(stat.read_text().rpartition(")")[2].split()[1])
            names[pid] = stat.with_name("cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except (OSError, ValueError):
            continue

    def is_below(pid: int) -> bool:
        while pid > 1:
            if pid == root:
                return True
            pid = parents.get(pid, 0)
        return False

    return {pid: name for pid, name in names.items() if is_below(pid)}


class MemoryWatch(threading.Thread):
    """Peak proportional set size (shared pages counted once) of every process below one, in MiB."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.root, self.ended = root, threading.Event()
        self.peaks: dict[int, float] = {}
        self.names: dict[int, str] = {}

    def run(self) -> None:
        while not self.ended.wait(POLL_S):
            for pid, name in processes_below(self.root).items():
                try:
                    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                except OSError:
                    continue
                found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
                if found:
                    self.names[pid] = name
                    self.peaks[pid] = max(self.peaks.get(pid, 0.0), int(found[1]) / 1024)

    def by_role(self) -> dict[str, list[float]]:
        roles: dict[str, list[float]] = {}
        for pid, peak in sorted(self.peaks.items()):
            name = self.names[pid]
            actor = re.match(r"ray::(\w+)", name)
            role = actor[1] if actor else "driver" if pid == self.root else "ray services"
            roles.setdefault(role, []).append(round(peak))
        return roles


def measure(recipe: str, overrides: list[str]) -> dict:
    """Run the loop once and collect its figures. Raises RuntimeError with the log if the run fails."""
    with tempfile.TemporaryDirectory(prefix="raysteer-bench-") as folder:
        arguments = [f"run.storage={folder}", "run.name=bench", *overrides]
        command = [sys.executable, "-m", "cluster", "train", recipe, *arguments]
        started = time.monotonic()
        with open(Path(folder) / "log", "w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            watch = MemoryWatch(process.pid)
            watch.start()
            code = process.wait()
            watch.ended.set()
            watch.join()
            if code:
                log.seek(0)
                raise RuntimeError(f"the run ended with exit code {code}:\n{log.read()[-3000:]}")
        rows = read_rows(Path(folder) / "bench" / "metrics.jsonl")
        seconds = time.monotonic() - started
    steady = rows[min(WARM_UP_STEPS, len(rows) - 1) :]
    medians = {}
    for key, _ in FIGURES:
        values = [row[key] for row in steady if key in row]
        if values:
            medians[key] = statistics.median(values)
    return {
        "recipe": recipe,
        "overrides": overrides,
        "steps": len(rows),
        "medians": medians,
        "steady_images_per_s": sum(r["throughput/images_per_s"] * r["stage/wall_s"] for r in steady)
        / sum(r["stage/wall_s"] for r in steady),
        "run_seconds": seconds,
        "start_up_seconds": seconds - sum(row["stage/wall_s"] for row in rows[1:]),
        "peak_pss_mib": watch.by_role(),
        "machine": f"{platform.processor() or platform.machine()}, {platform.platform()}",
    }


def render(result: dict) -> str:
    """The figures as a table."""
    lines = [
        f"{result['recipe']} {' '.join(result['overrides'])}: medians over steps {WARM_UP_STEPS + 1}..{result['steps']}"
    ]
    lines += [f"  {label:<44} {result['medians'][key]:10.3f}" for key, label in FIGURES if key in result["medians"]]
    lines.append(f"  {'images per second, whole steady phase':<44} {result['steady_images_per_s']:10.3f}")
    lines.append(f"  {'whole run, start and end included (s)':<44} {result['run_seconds']:10.1f}")
    lines.append("peak memory per process (proportional set size, MiB)")
    lines += [f"  {role:<44} {', '.join(f'{p:.0f}' for p in peaks)}" for role, peaks in result["peak_pss_mib"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop", description=__doc__)
    parser.add_argument("recipe", nargs="?", default="recipes/glyphs.yaml")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    overrides = (
        args.overrides if any(o.startswith("run.steps=") for o in args.overrides) else ["run.steps=20", *args.overrides]
    )
    result = measure(args.recipe, overrides)
    print(render(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
