"""How long a run takes to recover from each fault: ``python -m benchmarks.faults [NAME ...] [--write]``.

Plays the catalogue of tests/ray/catalogue.py, one run for each fault, on tiny models and a Ray cluster of this process.
For a fault that a run survives: seconds from the strike to the next finished learner step. For one that stops it:
seconds to the message, and, after the same command was given again, to the first finished step (the start of all
processes included). The run is watched twice a second, so that is how exact the figures are. ``--write`` puts the table
into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import documents
from learner.records import read_rows
from raysteer.errors import DeadlineExceeded, UserError
from tests.ray.catalogue import FINISHES, STOPS, Command, Fault, Scene
from tests.ray.conftest import World

NODES = "nodes-lost"


@dataclass(frozen=True)
class Measured:
    """Seconds; None where a fault leads to no such thing."""

    name: str
    done: str
    comes: str
    recovered_s: float | None = None
    stopped_s: float | None = None
    resumed_s: float | None = None


class Watch:
    """An observer that notes when steps finish, beside the one that does the damage."""

    def __init__(self, scene: Scene | None = None) -> None:
        self.scene = scene
        self.finished: list[float] = []

    def __call__(self, snapshot: Mapping[str, Any]) -> None:
        now = time.monotonic()
        self.finished += [now] * len(snapshot["reports"])
        if self.scene is not None:
            self.scene(dict(snapshot))


def measure(world: World, fault: Fault) -> Measured:
    """One run under one fault, and the same again if it stops."""
    from cluster.train import train

    recipe = world.recipe(fault.name, **{"run__checkpoint_every": 1, **fault.changes})
    scene = Scene(world, recipe.run_dir, fault)
    watch = Watch(scene)
    message = ""
    try:
        train(recipe, observe=watch)
    except (UserError, DeadlineExceeded) as error:
        message = str(error)
    ended = time.monotonic()
    if not scene.over or bool(message) != (fault.outcome == "stops"):
        raise RuntimeError(f"{fault.name}: not what was expected ({message or 'the run finished'})")
    struck = scene.struck[-1]
    if fault.outcome == "finishes":
        recovered = min(at for at in watch.finished if at > struck) - struck
        return Measured(fault.name, fault.done, fault.comes, recovered_s=recovered)
    print(f"{fault.name}: {message}")
    world.plan_faults()
    again, watch = time.monotonic(), Watch()
    train(recipe, observe=watch)
    return Measured(fault.name, fault.done, fault.comes, stopped_s=ended - struck, resumed_s=watch.finished[0] - again)


def measure_driver(world: World) -> Measured:
    """SIGKILL of the command, then the same command; it brings up a cluster of its own each time."""
    file = world.recipe_file("driver-killed", run__checkpoint_every=1)
    metrics = world.folder / "runs" / "driver-killed" / "metrics.jsonl"
    world.plan_faults(hold_after=5)
    with Command(file) as command:
        command.wait_until(world.holding)
        struck = time.monotonic()
        command.process.kill()
        command.ended()
        command.wait_until_gone()
        gone = time.monotonic()
    world.plan_faults()
    with Command(file) as command:
        command.wait_until(lambda: len(read_rows(metrics)) > 1)
        resumed = time.monotonic()
        command.ended()
    done = "SIGKILL of the driver (`raysteer train`)"
    comes = "its cluster ends with it; the same command goes on from the last checkpoint"
    return Measured("driver-killed", done, comes, stopped_s=gone - struck, resumed_s=resumed - gone)


def measure_nodes(world: World) -> list[Measured]:
    """The loss of a node, on a cluster of several nodes: the scenarios of tests/ray/test_nodes.py."""
    from tests.ray.test_nodes import play

    found = play(world, world.folder)
    members = "its members start where there is room, or are gone; its groups are drawn again"
    ranks = "an elastic learner (`learner.min_workers`) goes on with the ranks that are left, from the checkpoint"
    return [
        Measured(NODES, "loss of the node that drew and scored", members, found["come_and_go"]["recovered_s"]),
        Measured(NODES, "loss of the node of one of two learner ranks", ranks, found["fewer_ranks"]["recovered_s"]),
    ]


def table(measured: list[Measured]) -> str:
    """As Markdown."""

    def cell(seconds: float | None) -> str:
        return "" if seconds is None else f"{seconds:.1f}"

    head = "| fault | what comes of it | recovered s | stopped s | resumed s |\n|---|---|---|---|---|"
    rows = [
        f"| {m.done} | {m.comes} | {cell(m.recovered_s)} | {cell(m.stopped_s)} | {cell(m.resumed_s)} |"
        for m in measured
    ]
    return "\n".join([head, *rows])


def main() -> None:
    names = [*(fault.name for fault in (*FINISHES, *STOPS)), "driver-killed", NODES]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; all if none is given")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    args = parser.parse_args()
    if unknown := set(args.names) - set(names):
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    wanted, load = args.names or names, os.getloadavg()[0]

    # After the arguments: what follows reads its environment once, starts Ray and makes the tiny models.
    from cluster.config import ClusterConfig
    from cluster.runtime import init_ray
    from tests import tiny
    from tests.conftest import make_recipe_factory

    with tempfile.TemporaryDirectory(prefix="r") as folder:
        os.environ["RAY_TMPDIR"] = folder
        ray = init_ray(ClusterConfig(), num_cpus_needed=8)
        world = World(Path(folder), make_recipe_factory(Path(folder), tiny.tiny_pipeline(), tiny.tiny_clip()))
        measured = [measure(world, fault) for fault in (*FINISHES, *STOPS) if fault.name in wanted]
        ray.shutdown()
        if "driver-killed" in wanted:
            measured.append(measure_driver(world))
        if NODES in wanted:
            measured += measure_nodes(world)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, load before {load:.1f}, {time.strftime('%Y-%m-%d')}"
    text = f"{table(measured)}\n\nMeasured on {machine}, with `python -m benchmarks.faults`; tiny models."
    print(f"\n{text}")
    if args.write:
        documents.write(documents.DOCS / "reliability.md", "python -m benchmarks.faults --write", text)


if __name__ == "__main__":
    main()
