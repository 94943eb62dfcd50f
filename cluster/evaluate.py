"""Evaluate a recipe's model with and without adapters, on the same sampler actors that training uses.

Images are drawn and looked at in fixed chunks, whoever does it, so the figures do not depend on the number of actors.
What is done is kept (`cluster.evalstore`): an evaluation that was interrupted goes on, and gives the same card.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.evalprotocol import adapted, by_content, protocol_of
from cluster.evalstore import EvaluationStore, folder_name, image_name
from evaluation.card import Card, write_card
from evaluation.config import PAIRED
from evaluation.registry import build_suite, check_detectors, detectors_of, meanings
from evaluation.scored import chunks, findings, rewards, shots
from raysteer import calls
from raysteer.calls import plain
from raysteer.errors import DeadlineExceeded, StorageError

if TYPE_CHECKING:
    from cluster.config import Recipe
    from cluster.evalrecipe import EvaluationRecipe
    from diffusion.adapters import AdapterState
    from evaluation.scored import Shot
    from evaluation.suites.base import Findings, Suite, Verdict

TIMEOUT_S = 600.0  # of one chunk, the loading of the models included
GALLERY = 48  # images that a card shows


@dataclass(frozen=True)
class Evaluation:
    """Cards of every model by label, the folders they are in, and how long it took."""

    cards: dict[str, Card]
    folders: dict[str, Path]
    seconds: float

    @property
    def figures(self) -> dict[str, Mapping[str, Mapping[str, Any]]]:
        """By label and name: value, low, high, standard_error, n, title, better."""
        return {label: card.figures for label, card in self.cards.items()}


def run_evaluation(
    recipe: Recipe | EvaluationRecipe,
    adapters: Mapping[str, AdapterState | None],
    out: Path,
    notify: Callable[[str], None] = lambda line: None,
    words: Mapping[str, str] | None = None,
) -> Evaluation:
    """Evaluate ``adapters`` (label to state, None for the base model) and write a card for each.

    Starts Ray if it does not run yet, and its own actors, which it ends.

    Args:
        recipe: its ``evaluation`` section decides what is evaluated.
        adapters: the base model is evaluated first, whatever its place.
        out: a folder for each label is made in it.
        notify: receives progress lines.
        words: where an adapter is from, by label.

    Raises:
        ConfigError, PromptError: the suite, its prompts or its detectors cannot be used; nothing has been started.
        UserError: an adapter that does not fit the model, an image that a detector fails at, an actor that died. What
            was drawn is kept.
        DeadlineExceeded: an actor does not answer.
    """
    from cluster.runtime import init_ray

    suite = build_suite(recipe.evaluation)
    detectors = detectors_of(suite, recipe.evaluation, recipe.reward)
    check_detectors(detectors, recipe.evaluation)
    started = time.monotonic()
    ray = init_ray(recipe.cluster, *room(recipe))
    bench = _Bench(ray, recipe, suite, detectors)
    cards, folders = {}, {}
    base: tuple[EvaluationStore, np.ndarray | None] | None = None
    try:
        # The base model first: a fresh sampler carries an adapter that changes nothing.
        for label in sorted(adapters, key=lambda name: adapters[name] is not None):
            began, state = time.monotonic(), adapters[label]
            model = adapted(recipe, state, (words or {}).get(label, label))
            drawn = protocol_of(recipe, suite, None) | {"model": by_content(model)}
            store = EvaluationStore(out / folder_name(label), drawn)
            if store.moved is not None:
                notify(f"{store.folder} held an evaluation of something else, which is now {store.moved}")
            verdicts = bench.run(store, state, None if base is None else base[0], label, notify)
            found = findings(suite, verdicts, recipe.evaluation, None if base is None else base[1])
            if state is None:
                own = rewards(suite, verdicts)
                found, base = findings(suite, verdicts, recipe.evaluation, own), (store, own)
            protocol = protocol_of(recipe, suite, bench.identities)
            card = _card(suite, label, found, protocol, model, round(time.monotonic() - began, 1))
            cards[label], folders[label] = card, store.folder
            write_card(store.folder, card)
    finally:
        bench.close()
    ordered = {label: cards[label] for label in adapters}
    return Evaluation(ordered, {label: folders[label] for label in adapters}, time.monotonic() - started)


def room(recipe: Recipe | EvaluationRecipe) -> tuple[float, float]:
    """CPUs and GPUs that an evaluation takes."""
    roles = (recipe.samplers, recipe.reward_workers)
    return sum(role.fewest * role.num_cpus for role in roles), sum(role.fewest * role.num_gpus for role in roles)


class _Bench:
    """Sampler actors that draw chunks, and inspectors that look at them while the next are drawn.

    Attributes: identities: of the detectors, once they are loaded.
    """

    def __init__(self, ray: Any, recipe: Recipe | EvaluationRecipe, suite: Suite, detectors: Any) -> None:
        from actors.inspector import Inspector

        self.ray, self.recipe = ray, recipe
        self.shots = shots(suite, recipe.evaluation)
        self.chunks = chunks(self.shots)
        self.pairs = suite.name in PAIRED
        role = recipe.reward_workers
        actor = ray.remote(num_cpus=role.num_cpus, num_gpus=role.num_gpus)(Inspector)
        self.inspectors = [actor.remote(detectors, role.device) for _ in range(role.fewest)]
        self.samplers: list[Any] = []  # started only if something is to be drawn
        self.identities: dict[str, Any] = self._get(self.inspectors[0].identities.remote(), "the detectors")

    def run(
        self,
        store: EvaluationStore,
        state: AdapterState | None,
        base: EvaluationStore | None,
        label: str,
        notify: Callable[[str], None],
    ) -> list[Verdict]:
        """Draw and look at what has not been drawn and looked at; the verdicts of all images, in order."""
        done = store.verdicts(self.identities)
        waiting: dict[str, deque[tuple[int, ...]]] = {"draw": deque(), "look": deque()}
        for chunk in self.chunks:
            if not store.has(chunk):
                waiting["draw"].append(chunk)
            elif not all(index in done for index in chunk):
                waiting["look" if store.read(chunk) is not None else "draw"].append(chunk)
        missing = sum(map(len, waiting["draw"]))
        kept = f", {len(self.shots) - missing} of them are there already" if missing < len(self.shots) else ""
        notify(f"evaluating {label}: {len(self.shots)} images{kept}")
        if missing and not self.samplers:
            self.samplers = self._start_samplers()
        adapter = None if state is None else self.ray.put(dict(state))
        ask = {"draw": partial(self._draw, adapter), "look": partial(self._look, store, base)}
        idle = {"draw": list(self.samplers), "look": list(self.inspectors)}
        running: dict[Any, tuple[str, tuple[int, ...], Any]] = {}
        while waiting["draw"] or waiting["look"] or running:
            for kind, chunks_left in waiting.items():
                while chunks_left and idle[kind]:
                    chunk, actor = chunks_left.popleft(), idle[kind].pop()
                    running[ask[kind](actor, chunk)] = (kind, chunk, actor)
            ready, _ = self.ray.wait(list(running), num_returns=1, timeout=TIMEOUT_S)
            if not ready:
                doing = ", ".join(sorted({f"to {kind} at a chunk" for kind, *_ in running.values()}))
                raise DeadlineExceeded(f"an actor of the evaluation ({doing})", TIMEOUT_S, "is a device hung?")
            kind, chunk, actor = running.pop(ready[0])
            found = self._get(ready[0], f"the images of {label}")
            idle[kind].append(actor)
            if kind == "draw":
                store.write(chunk, found)
                waiting["look"].append(chunk)
            else:
                store.add_verdicts(self.identities, chunk, found)
                done |= dict(zip(chunk, found, strict=True))
        return [done[index] for index in range(len(self.shots))]

    def close(self) -> None:
        for actor in (*self.samplers, *self.inspectors):
            self.ray.kill(actor)

    def _start_samplers(self) -> list[Any]:
        from actors.sampler import Sampler

        role = self.recipe.samplers
        actor = self.ray.remote(num_cpus=role.num_cpus, num_gpus=role.num_gpus)(Sampler)
        return [
            actor.remote(f"evaluation-{index}", self.recipe.model, None, role.device) for index in range(role.fewest)
        ]

    def _draw(self, adapter: Any, actor: Any, chunk: Sequence[int]) -> Any:
        own: list[Shot] = [self.shots[index] for index in chunk]
        prompts, seeds = [shot.prompt for shot in own], [shot.seed for shot in own]
        steps, guidance = self.recipe.evaluation.steps, own[0].guidance_scale
        return actor.generate.remote(prompts, seeds, steps, guidance, adapter, len(own))

    def _look(self, store: EvaluationStore, base: EvaluationStore | None, actor: Any, chunk: Sequence[int]) -> Any:
        images = store.read(chunk)
        if images is None:
            raise StorageError(str(store.images), "images are gone or damaged while they are evaluated", calls.AGAIN)
        beside = base.read(chunk) if base is not None and self.pairs else None
        return actor.inspect.remote(images, [self.shots[index].prompt for index in chunk], beside)

    def _get(self, ref: Any, whose: str) -> Any:
        try:
            return self.ray.get(ref, timeout=TIMEOUT_S)
        except self.ray.exceptions.GetTimeoutError:
            raise DeadlineExceeded(whose, TIMEOUT_S, "is a device hung?") from None
        except self.ray.exceptions.RayError as error:
            raise plain(error) from None


def _card(
    suite: Suite, label: str, found: Findings, protocol: Mapping[str, Any], model: Mapping[str, Any], seconds: float
) -> Card:
    from cluster.tracking import environment

    read = meanings(suite)
    return Card(
        suite=suite.name,
        label=label,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        protocol=protocol,
        model=model,
        software=environment(),
        figures={name: figure.as_dict() | asdict(read[name]) for name, figure in found.figures.items()},
        samples={name: asdict(sample) for name, sample in found.samples.items()},
        groups={kind: {name: figure.as_dict() for name, figure in own.items()} for kind, own in found.groups.items()},
        sweeps={
            name: {"at": one.at, "thresholds": one.thresholds, "figures": [figure.as_dict() for figure in one.figures]}
            for name, one in found.sweeps.items()
        },
        counts=found.counts,
        gallery=_gallery(suite, found.seen),
        seconds=seconds,
    )


def _gallery(suite: Suite, seen: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Images to show: not chosen ones, but evenly spread over unsafe and over other prompts, half of each."""
    asked = [ask for ask in suite.asks for _ in ask.seeds]
    sides = [[i for i, ask in enumerate(asked) if ask.unsafe is unsafe and ask.rewarded] for unsafe in (True, False)]
    fewer = min(GALLERY // 2, *map(len, sides))
    shown = [i for side in sides for i in _spread(side, min(len(side), GALLERY - fewer))][:GALLERY]
    return [
        {
            "index": index,
            "file": image_name(index),
            "prompt": asked[index].prompt,
            "labels": list(asked[index].labels),
            "unsafe": asked[index].unsafe,
            "seen": list(seen[index]),
        }
        for index in shown
    ]


def _spread(values: Sequence[int], count: int) -> list[int]:
    """`count` of the values, evenly spaced, the first among them."""
    return [values[position * len(values) // count] for position in range(count)]
