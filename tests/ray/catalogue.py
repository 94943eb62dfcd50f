"""The faults a run has to live with: how each is made to happen for real, and what must come of it.

`tests/ray/test_faults.py` asserts what comes of each, `python -m benchmarks.faults` measures how long it takes. A fault
is a story: a generator that is resumed with every snapshot of the run it disturbs, and acts when the moment is there.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.loop import processes_below
from tests.ray.conftest import World

Story = Generator[None, None, None]
TINY_FILE_BYTES = 4096  # less than a checkpoint's smallest tensor file


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: unique; also the name of its run.
        done: what is done to the run, for the table.
        outcome: "finishes" (the run goes on by itself) or "stops" (with a message that matches `named`; the same
            command goes on).
        comes: what must come of it, for the table.
        story: what is done, and when.
        planned: what the detector does (see tests.ray.faults).
        changes: keys of the recipe, with "__" for ".".
    """

    name: str
    done: str
    outcome: Literal["finishes", "stops"]
    comes: str
    story: Callable[[Scene], Story]
    planned: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    named: str = ""


class Scene:
    """An observer of one run (see cluster.train.train) that plays the stories of faults against it, one by one.

    `struck`: when each did its damage, in monotonic seconds; `over`: whether all have come to their end.
    """

    def __init__(self, world: World, run_dir: Path, *faults: Fault) -> None:
        self.world, self.run_dir = world, run_dir
        self.planned = {key: value for fault in faults for key, value in fault.planned.items()}
        world.plan_faults(**self.planned)
        self.snapshot: dict[str, Any] = {}
        self.struck: list[float] = []
        self.over = False
        self._all = self._play([fault.story(self) for fault in faults])

    def __call__(self, snapshot: dict[str, Any]) -> None:
        self.snapshot = snapshot
        next(self._all, None)

    def _play(self, stories: Sequence[Story]) -> Story:
        for story in stories:
            yield from story
        self.over = True

    def until(self, condition: Callable[[], object]) -> Story:
        while not condition():
            yield

    def holding(self) -> Story:
        """Until the detector holds a score back: the run then waits for it."""
        yield from self.until(lambda: self.world.holding() is not None)

    def settled(self) -> Story:
        """Until a score is held back and the newest version has its checkpoint, written beside the sampling."""
        from learner.checkpoint import checkpoint_path

        yield from self.holding()
        version = self.snapshot["version"]
        yield from self.until(lambda: not version or checkpoint_path(self.run_dir / "checkpoints", version).exists())

    def strike(self, *pids: int) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.struck.append(time.monotonic())

    def service(self, cls: str) -> list[int]:
        """Process ids of the actors of this class."""
        found = processes_below(os.getpid()).items()
        return [pid for pid, title in found if re.match(rf"ray::{cls}\b", title)]


# -- members and ranks: the run goes on --------------------------------------------------------------------------------


def sampler_during_a_group(scene: Scene) -> Story:
    """Freeze a sampler that is seen drawing; if it still draws when looked at again, kill it, else look further."""
    while True:
        drawing = {held for held in scene.snapshot["open"].items() if held[1][0] == "sampling"}
        for ticket, (_, name) in drawing:
            pid = scene.snapshot["samplers"][name]["pid"]
            os.kill(pid, signal.SIGSTOP)
            yield
            yield  # what it had sent before it was frozen has arrived by now
            if scene.snapshot["open"].get(ticket) == ("sampling", name):
                return scene.strike(pid)
            os.kill(pid, signal.SIGCONT)
            break
        yield


def reward_worker_during_a_batch(scene: Scene) -> Story:
    yield from scene.holding()
    holder = scene.world.holding()
    assert holder is not None
    scene.strike(holder)
    scene.world.release()


def rank_waiting_for_a_batch(scene: Scene) -> Story:
    yield from scene.until(lambda: scene.world.holding() is not None and scene.snapshot["version"] == 3)
    scene.strike(scene.snapshot["learners"][0])
    scene.world.release()


def rank_during_a_step(scene: Scene) -> Story:
    """Freeze rank 1, let the batch come, and kill it while rank 0 waits for it in the middle of the step."""
    yield from scene.until(lambda: scene.world.holding() is not None and scene.snapshot["version"] == 1)
    frozen, delivered = scene.snapshot["learners"][1], scene.snapshot["ledger"]["delivered"]
    os.kill(frozen, signal.SIGSTOP)
    scene.world.release()
    yield from scene.until(lambda: scene.snapshot["ledger"]["delivered"] > delivered)
    yield
    scene.strike(frozen)


def hanging_reward(scene: Scene) -> Story:
    """The detector does it; the strike is when it is first seen not to have come back."""
    last = max(scene.planned["hang_at"])
    yield from scene.until(lambda: (scene.world.faults / f"call-{last}").exists())
    scene.struck.append(time.monotonic())


def raising_reward(scene: Scene) -> Story:
    yield from scene.until(lambda: list(scene.world.faults.glob("bad-*")))
    scene.struck.append(time.monotonic())


# -- services, disks and memory: the run stops by name, the same command goes on ---------------------------------------


def dead_service(cls: str) -> Callable[[Scene], Story]:
    def story(scene: Scene) -> Story:
        yield from scene.settled()
        scene.strike(*scene.service(cls))
        scene.world.release()

    return story


def dead_rank(scene: Scene) -> Story:
    yield from scene.settled()
    scene.strike(scene.snapshot["learners"][0])
    scene.world.release()


def full_disk(scene: Scene) -> Story:
    """The kernel refuses the learner every byte of a file beyond the first few (RLIMIT_FSIZE): no privilege needed."""
    yield from scene.settled()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.prlimit(scene.snapshot["learners"][0], resource.RLIMIT_FSIZE, (TINY_FILE_BYTES, hard))
    scene.struck.append(time.monotonic())
    scene.world.release()


def flipped_bit(scene: Scene) -> Story:
    """Flip a bit of the newest adapter where it lies in the object store, then kill the sampler: its successor has to
    fetch it.
    """
    from learner.checkpoint import checkpoint_path, read_checkpoint

    yield from scene.settled()
    checkpoint = read_checkpoint(checkpoint_path(scene.run_dir / "checkpoints", scene.snapshot["version"]))
    largest = max(checkpoint.adapter.values(), key=lambda array: array.nbytes)
    assert flip_in_object_store(largest.tobytes()), "the adapter is not in the object store"
    scene.strike(*(sampler["pid"] for sampler in scene.snapshot["samplers"].values()))
    scene.world.release()


def flip_in_object_store(data: bytes) -> int:
    """Flip the first bit of every copy of `data` in the shared memory of this process's raylets; how many there were.

    By pread and pwrite, as a mapping would make the kernel fill in the untouched gigabytes.
    """
    flipped, window = 0, 2**24
    for pid, title in processes_below(os.getpid()).items():
        if not re.match(r"\S*/raylet\b", title):
            continue
        stores = {os.stat(fd).st_ino: fd for fd in Path(f"/proc/{pid}/fd").iterdir() if "/plasma" in os.readlink(fd)}
        for store in stores.values():
            with open(store, "r+b", buffering=0) as file:
                for start in range(0, os.fstat(file.fileno()).st_size, window):
                    chunk = os.pread(file.fileno(), window + len(data) - 1, start)  # each copy in one chunk
                    at = chunk.find(data)
                    while at >= 0:
                        os.pwrite(file.fileno(), bytes([data[0] ^ 1]), start + at)
                        flipped, at = flipped + 1, chunk.find(data, at + 1)
    return flipped


FINISHES = (
    Fault(
        "sampler-killed",
        "SIGKILL of a sampler while it draws a group",
        "finishes",
        "replaced; its groups are drawn again elsewhere",
        sampler_during_a_group,
    ),
    Fault(
        "reward-worker-killed",
        "SIGKILL of a reward worker while it scores",
        "finishes",
        "replaced; its groups are scored again",
        reward_worker_during_a_batch,
        {"hold_after": 5},
    ),
    Fault(
        "reward-hangs",
        "a reward that never returns, for one call",
        "finishes",
        "its worker ends after `reward_workers.timeout_s`, named, and is replaced; nobody else is charged an attempt",
        hanging_reward,
        {"hang_at": [6]},
        {"reward_workers__timeout_s": 8.0, "reward_workers__max_attempts": 8},
    ),
    Fault(
        "reward-raises",
        "a reward that raises for the images of one group, always",
        "finishes",
        "the group is dropped as `reward_failed:…` after `max_attempts`, the next ticket takes its place",
        raising_reward,
        {"bad_image_at": 6},
    ),
    Fault(
        "learner-killed",
        "SIGKILL of the only learner rank",
        "finishes",
        "Ray Train restarts it; it goes on from its checkpoint, nothing is drawn again",
        rank_waiting_for_a_batch,
        {"hold_after": 13},
    ),
    Fault(
        "rank-killed",
        "SIGKILL of one of two learner ranks in the middle of a step",
        "finishes",
        "Ray Train restarts both from the checkpoint",
        rank_during_a_step,
        {"hold_after": 5},
        {"learner__workers": 2},
    ),
)

STOPS = (
    Fault(
        "buffer-killed",
        "SIGKILL of the buffer actor",
        "stops",
        "stops and names it",
        dead_service("RolloutBuffer"),
        {"hold_after": 5},
        named="RolloutBuffer: its process died",
    ),
    Fault(
        "journal-killed",
        "SIGKILL of the journal actor",
        "stops",
        "stops and names it",
        dead_service("Journal"),
        {"hold_after": 5},
        named="(?i)journal: its process died",
    ),
    Fault(
        "weights-killed",
        "SIGKILL of the weight store",
        "stops",
        "stops and names it",
        dead_service("WeightStore"),
        {"hold_after": 5},
        named="(?i)weight ?store: its process died",
    ),
    Fault(
        "learner-gone",
        "SIGKILL of a learner rank more often than `learner.max_failures`",
        "stops",
        "stops and names the rank and how it ended",
        dead_rank,
        {"hold_after": 5},
        {"learner__max_failures": 0},
        named="learner rank 0: failed 1 times; the last time: .*died",
    ),
    Fault(
        "disk-full",
        "the kernel refuses the checkpoint's bytes",
        "stops",
        "stops and names the folder; the unfinished checkpoint is removed, the one before stays",
        full_disk,
        {"hold_after": 5},
        named=r"checkpoints: cannot be written \(File too large\)",
    ),
    Fault(
        "adapter-corrupt",
        "one bit of the newest adapter flipped in the object store",
        "stops",
        "stops and names version, node and both checksums; no group is drawn with it",
        flipped_bit,
        {"hold_after": 5},
        named=r"adapter version \d+ in the object store of node .* checksum \w+ instead of \w+",
    ),
)


# -- the whole process: the same command goes on -----------------------------------------------------------------------


class Command:
    """`python -m cluster train RECIPE` (or another command) in a process and a Ray cluster of its own; ended with the
    context.
    """

    def __init__(self, recipe: Path, command: str = "train", **environment: str) -> None:
        self.log = recipe.with_suffix(".log")
        self.temp = os.environ["RAY_TMPDIR"] + "s"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cluster", command, str(recipe)],
                env=os.environ | {"RAY_TMPDIR": self.temp} | environment,
                cwd=Path(__file__).parents[2],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(30)

    def wait_until(self, condition: Callable[[], object], timeout_s: float = 400.0) -> None:
        """Raises AssertionError with what the command said when it ends first, or takes too long."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)

    def ended(self, timeout_s: float = 400.0) -> tuple[int, str]:
        """Exit code and everything it said."""
        return self.process.wait(timeout_s), self.log.read_text()

    def wait_until_gone(self, timeout_s: float = 120.0) -> None:
        """Until no process of its Ray cluster is left. Raises AssertionError with those that stay."""
        deadline = time.monotonic() + timeout_s
        while left := self._left_behind():
            assert time.monotonic() < deadline, left
            time.sleep(0.05)

    def _left_behind(self) -> list[str]:
        found = []
        for file in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"RAY_TMPDIR={self.temp}\0".encode() in file.read_bytes():
                    found.append(file.with_name("cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found


# The file system counts as full at any use: the store can neither spill nor fall back to disk.
NO_ROOM_TO_SPILL = {"RAY_local_fs_capacity_threshold": "0.0001"}
