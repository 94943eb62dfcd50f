"""An evaluation on a real cluster: interrupted it goes on and gives the same card; of something else it begins anew."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from cluster.evaluate import Evaluation, run_evaluation
from diffusion.policy import DiffusionPolicy
from evaluation.card import Card, read_card
from raysteer.errors import UserError
from tests.ray.conftest import World
from tests.ray.test_beside import SUITE

pytestmark = pytest.mark.timeout(600)


def adapter_of(recipe: Any, seed: int) -> dict[str, Any]:
    """An adapter that changes something."""
    import numpy as np

    rng = np.random.default_rng(seed)
    state = DiffusionPolicy.load(recipe.model).adapter_state()
    weights = {name: value for name, value in state.items() if "lora" in name and "alpha" not in name}
    return state | {name: value + rng.normal(0, 0.3, value.shape).astype("f4") for name, value in weights.items()}


def lasting(card: Card) -> dict[str, Any]:
    """A card without when it was made and how long that took."""
    return {key: value for key, value in dataclasses.asdict(card).items() if key not in ("created", "seconds")}


def test_an_interrupted_evaluation_goes_on_and_gives_the_same_cards(world: World, ray_cluster: Any) -> None:
    world.plan_faults()
    recipe = world.recipe("evaluated", evaluation=SUITE)
    adapters = {"base": None, "adapted": adapter_of(recipe, 0)}
    told: list[str] = []

    def evaluate(words: str = "here", **changes: Any) -> Evaluation:
        told.clear()
        changed, out = world.recipe("evaluated", evaluation=SUITE | changes), world.folder / "evaluated"
        return run_evaluation(changed, adapters, out, told.append, {"adapted": words})

    first = evaluate()
    assert told == ["evaluating base: 10 images", "evaluating adapted: 10 images"]
    for label, folder in first.folders.items():
        assert lasting(read_card(folder)) == json.loads(json.dumps(lasting(first.cards[label])))
        assert f"{first.figures[label]['utility']['value']:.3f}" in (folder / "card.md").read_text()
    images = {file.name: file.read_bytes() for file in (first.folders["adapted"] / "images").iterdir()}
    assert len(images) == 10
    assert first.figures["base"]["reward"]["value"] != first.figures["adapted"]["reward"]["value"]

    folder = first.folders["adapted"]  # as if it had been killed: a verdict half written, images missing and torn
    (verdicts,) = folder.glob("verdicts-*.jsonl")
    verdicts.write_text(verdicts.read_text()[:-20])
    (folder / "images" / "000003.png").unlink()
    (folder / "images" / "000004.png").write_bytes(images["000004.png"][:30])
    (folder / "card.json").unlink()
    again = evaluate()
    assert told[0].endswith("10 of them are there already")
    assert {file.name: file.read_bytes() for file in (folder / "images").iterdir()} == images
    assert {label: lasting(card) for label, card in again.cards.items()} == {
        label: lasting(card) for label, card in first.cards.items()
    }

    moved = evaluate(words="elsewhere")
    assert moved.cards["adapted"].model["adapter"]["source"] == "elsewhere"
    assert told == [f"evaluating {label}: 10 images, 10 of them are there already" for label in adapters]

    evaluate(seed=5)
    assert len(told) == 4 and "held an evaluation of something else, which is now" in told[0]
    kept = lasting(read_card(Path(f"{folder}.1")))
    assert kept == json.loads(json.dumps(lasting(moved.cards["adapted"]))), "what was there is only moved"
    assert lasting(read_card(folder))["protocol"]["prompt_set_sha256"] != kept["protocol"]["prompt_set_sha256"]


def test_an_adapter_of_another_model_is_refused_and_leaves_no_card(world: World, ray_cluster: Any) -> None:
    world.plan_faults()
    recipe = world.recipe("stranger", evaluation=SUITE)
    strange = {name.replace("to_q", "to_qq"): value for name, value in adapter_of(recipe, 0).items()}
    out = world.folder / "stranger"
    with pytest.raises(UserError, match=r"to_qq|adapter"):
        run_evaluation(recipe, {"base": None, "adapted": strange}, out)
    assert (out / "base" / "card.json").is_file() and not (out / "adapted" / "card.json").exists()
