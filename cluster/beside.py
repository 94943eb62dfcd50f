"""Evaluation beside training: every due checkpoint is evaluated, in order, and nobody waits for it.

Driven by the supervising loop about twice a second. A checkpoint's adapter is held from the moment it is seen, so that
it may be rotated away; one actor (`actors.evaluator.Evaluator`) takes one after another. It never fails the run: an
evaluator that dies, fails or stands still is replaced, and when that does not help the step is recorded without
figures.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cluster.final import export_adapter, kept_step
from cluster.layout import evaluator_need, lay_out
from cluster.placement import Need, live_nodes
from cluster.services import logging_as, start_actor
from cluster.supervisor import member_id
from evaluation.guards import KL_PROMPTS
from evaluation.registry import build_suite, detectors_of
from evaluation.scored import chunks, shots
from evaluation.stopping import BASE_STEP
from evaluation.suites.table import spread
from learner.checkpoint import (
    Checkpoint,
    DamagedCheckpoint,
    checkpoint_path,
    list_checkpoints,
    read_checkpoint,
    step_of,
)
from raysteer.calls import plain

if TYPE_CHECKING:
    from pathlib import Path

    from cluster.config import Recipe
    from cluster.evaluations import Evaluations

MAX_REPLACEMENTS = 3  # of the evaluator, for one step
SILENCE_S = 600.0  # longest without an answer: to load, or to draw one chunk of images and look at them
SHOWN = ("reward_corrected", "reward", "inappropriate_rate", "utility")
GUARD_TAG = "raysteer.guard"  # in MLflow: which guard ended the run

logger = logging.getLogger(__name__)


@dataclass
class Due:
    """An evaluation to be done. `checkpoint`: None for the base model; without moments, and what is not exported."""

    step: int
    checkpoint: Checkpoint | None
    failures: int = 0


@dataclass
class Attempt:
    """The evaluation under way: all it was asked, the figures last, and how many answers have come."""

    calls: Sequence[Any]
    began: float = field(default_factory=time.monotonic)
    answers: int = 0
    heard: float = field(default_factory=time.monotonic)


class Beside:
    """See the module. An observer of the run.

    Args:
        recipe: of the run, with `evaluation.every`; of a round of one, the round's.
        steps: of the whole run.
        first_step: that the run goes on from.
        evaluations: the record of the run.
        tracker: actor that gets the figures.

    Attributes:
        news: lines for people that nobody has shown yet.
    """

    def __init__(self, recipe: Recipe, steps: int, first_step: int, evaluations: Evaluations, tracker: Any) -> None:
        need = evaluator_need(recipe)
        assert need is not None, "only a recipe with evaluation.every comes here"
        self.recipe, self.steps, self.evaluations, self.tracker = recipe, steps, evaluations, tracker
        self.folder, self.need = evaluations.folder, need
        self.node = lay_out(recipe, live_nodes(), recipe.cluster.autoscaling).evaluator
        self.suite = build_suite(recipe.evaluation)
        drawn = shots(self.suite, recipe.evaluation)
        self.chunks = chunks(drawn)
        self.kl_shots = spread(len(drawn), KL_PROMPTS) if recipe.evaluation.with_kl else []
        self.news: list[str] = []
        self.waiting: deque[Due] = deque()
        self.attempt: Attempt | None = None
        self.actor: Any = None
        self.actors = 0
        if evaluations.others:
            count = evaluations.others
            logger.warning("%s: %d rows of other settings do not count", self.folder.evaluations, count)
        try:
            evaluations.forget_after(first_step)
            self._mend_best()
        except OSError as error:
            self._unwritten(error)
        self.seen = evaluations.done
        self.tagged: str | None = None
        self._tag()
        self._go_on()

    @property
    def pending(self) -> bool:
        """An evaluation is under way, or waits for its turn."""
        return bool(self.waiting)

    @property
    def end(self) -> str | None:
        """Why the run is to end before its last step, or None."""
        verdict = self.evaluations.verdict
        return verdict.words(self.evaluations.rule.figure) if verdict.stops else None

    def taken(self) -> list[tuple[str | None, Need]]:
        """Node and need of the evaluator, for whoever shares out the room."""
        return [(self.node, self.need)]

    def __call__(self, snapshot: Mapping[str, Any]) -> None:
        """Look for new checkpoints and for answers; never waits for either."""
        self._go_on()

    def wait(self, timeout_s: float) -> None:
        """Until something may have changed, `timeout_s` at the most."""
        import ray

        left = [] if self.attempt is None else self.attempt.calls[self.attempt.answers :]
        if left:
            ray.wait(list(left), num_returns=1, timeout=timeout_s)
        else:
            time.sleep(timeout_s)

    def close(self) -> None:
        """End the evaluator, whatever it is at."""
        import ray

        self.waiting.clear()
        self.attempt = None
        if self.actor is not None:
            ray.kill(self.actor)
            self.actor = None

    # -- what is due ---------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        if self.attempt is not None:
            self._collect(self.attempt)
        if self.evaluations.verdict.stops:  # later evaluations would not change it
            self.close()
            return
        self._look()
        if self.attempt is None and self.waiting:
            self._ask(self.waiting[0])

    def _look(self) -> None:
        """Take the adapters of checkpoints that are due and new."""
        paths = {step_of(path): path for path in list_checkpoints(self.folder.checkpoints)}
        for step in due_steps(self.recipe.evaluation.every or self.steps, self.steps, max(paths, default=BASE_STEP)):
            if step in self.seen:
                continue
            self.seen.add(step)
            checkpoint = None if step == BASE_STEP else self._adapter(step, paths.get(step))
            if step == BASE_STEP or checkpoint is not None:
                self.waiting.append(Due(step, checkpoint))

    def _adapter(self, step: int, path: Path | None) -> Checkpoint | None:
        """The checkpoint of a step, as little of it as it takes; None when it cannot be read any more."""
        try:
            if path is not None:
                checkpoint = read_checkpoint(path, optimizer=False)
                return checkpoint if checkpoint.ema is None else replace(checkpoint, adapter={})
            why = "it is not there any more; raise run.keep_checkpoints"
        except DamagedCheckpoint as error:
            why = error.problem
        logger.warning("the adapter of step %d cannot be had from its checkpoint: %s", step, why)
        return None

    # -- the evaluator -------------------------------------------------------------------------------------------------

    def _ask(self, due: Due) -> None:
        """Begin an evaluation. The calls are answered in this order; a chunk each, so that silence is noticed early."""
        if self.actor is None:
            self.actor = self._start()
        adapter = None if due.checkpoint is None else dict(due.checkpoint.exported)
        evaluations, trained = self.evaluations, due.checkpoint is not None
        base = (evaluations.base_rewards, evaluations.base_samples) if trained else (None, None)
        began = self.actor.begin.remote(adapter)
        drawing = [self.actor.draw.remote(chunk) for chunk in self.chunks]
        drawing += [self.actor.diverge.remote(index, self.recipe.sampling) for index in self.kl_shots]
        self.attempt = Attempt([began, *drawing, self.actor.judge.remote(*base)])

    def _start(self) -> Any:
        from actors.evaluator import Evaluator

        recipe, name = self.recipe, member_id("evaluator", 0, self.actors)
        self.actors += 1
        detectors = detectors_of(self.suite, recipe.evaluation, recipe.reward)
        # It has the GPUs of a sampler. Rewards that are to be scored on CPUs stay there, for equal figures.
        both = recipe.reward_workers.num_gpus and recipe.samplers.num_gpus
        scoring_device = recipe.reward_workers.device if both else "cpu"
        arguments = (name, recipe.model, recipe.evaluation, detectors, recipe.samplers.device, scoring_device)
        actor = start_actor(Evaluator, *arguments, need=self.need, node=self.node)
        return logging_as(recipe.run.name, "evaluator", name, actor)

    def _collect(self, attempt: Attempt) -> None:
        """See how far the evaluation is; record what has come of it."""
        import ray

        answered, late = ray.wait(list(attempt.calls), num_returns=len(attempt.calls), timeout=0)
        try:
            answers = ray.get(answered)
        except ray.exceptions.RayError as error:
            self._failed(" ".join(str(plain(error)).split())[:300])
            return
        now = time.monotonic()
        if not late:
            self._record(answers[-1], now - attempt.began)
        elif len(answered) > attempt.answers:
            attempt.answers, attempt.heard = len(answered), now
        elif now - attempt.heard > SILENCE_S:
            self.node = None  # there may be no room for it where it should be
            self._failed(f"nothing was heard from it for {SILENCE_S:g} s")

    def _failed(self, why: str) -> None:
        """The evaluator cannot be used any more."""
        import ray

        due = self.waiting[0]
        due.failures += 1
        ray.kill(self.actor)
        self.actor = self.attempt = None
        if self.node not in {node.id for node in live_nodes()}:
            self.node = None
        if due.failures <= MAX_REPLACEMENTS:
            logger.warning("the evaluator failed at step %d and is replaced: %s", due.step, why)
            return
        self.waiting.popleft()
        logger.warning("step %d is not evaluated, %d evaluators failed: %s", due.step, due.failures, why)
        try:
            self.evaluations.add_failure(due.step, why)
        except OSError as error:
            self._unwritten(error)

    # -- what came of it -----------------------------------------------------------------------------------------------

    def _record(self, found: dict[str, Any], seconds: float) -> None:
        due, self.attempt = self.waiting.popleft(), None
        is_best = False
        try:
            is_best = self.evaluations.add(due.step, found, seconds)
            self._keep_best(due.checkpoint)
        except OSError as error:
            self._unwritten(error)
        values = {name: figure["value"] for name, figure in found["figures"].items()}
        metrics = {f"evaluation/{name}": value for name, value in values.items()}
        self.tracker.log_metrics.remote(due.step, metrics | self.evaluations.room_left(due.step))
        if due.step == BASE_STEP:
            for name in self.evaluations.unwatched():
                logger.warning("evaluation.guards: these prompts give no figure %s, so its guard watches nothing", name)
        self._tag()
        shown = ", ".join(f"{name} {values[name]:.3f}" for name in SHOWN if name in values)
        whose = "the base model" if due.step == BASE_STEP else f"step {due.step}"
        self.news.append(f"evaluation of {whose}: {shown}{', the best so far' if is_best else ''} ({seconds:.0f} s)")

    def _keep_best(self, checkpoint: Checkpoint | None) -> None:
        """Write `best` anew if this checkpoint is what the run would leave now."""
        if not self.recipe.evaluation.may_end or checkpoint is None:
            return
        if checkpoint.step == self.evaluations.verdict.export_step:
            export_adapter(self.recipe, self.folder.best, checkpoint)

    def _mend_best(self) -> None:
        """Write `best` anew where the rows name another step: its writer was killed between the two."""
        step = self.evaluations.verdict.export_step
        if self.recipe.evaluation.may_end and step is not None and kept_step(self.folder) != step:
            self._keep_best(self._adapter(step, checkpoint_path(self.folder.checkpoints, step)))

    def _tag(self) -> None:
        """Say in MLflow which guard ended the run; what an earlier guard had said is withdrawn."""
        broken = self.evaluations.verdict.broken or "none is broken"
        if broken != self.tagged:
            self.tagged = broken
            self.tracker.set_tags.remote({GUARD_TAG: broken})

    def _unwritten(self, error: OSError) -> None:
        """A full disk is noticed by name at the next checkpoint; an evaluation does not end the run."""
        logger.warning("what an evaluation found cannot be written below %s: %s", self.folder.path, error.strerror)


def due_steps(every: int, steps: int, newest: int) -> list[int]:
    """Steps up to `newest` whose adapters are evaluated: 0, multiples of `every`, and the last of `steps`."""
    due = list(range(0, min(newest, steps) + 1, every))
    return due if newest < steps or steps in due else [*due, steps]
