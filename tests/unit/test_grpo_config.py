"""The objective as a component: how it normalises, how it is found, what it refuses."""

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from cluster.config import load_recipe
from diffusion.sampling import SamplingConfig
from learner.grpo import GRPO, GRPOConfig
from learner.objective import OBJECTIVES, build_objective
from raysteer.errors import ConfigError
from tests.conftest import RecipeFactory
from tests.policies import GUIDANCE, drawn


def test_the_objective_normalises_as_configured() -> None:
    rewards = np.random.default_rng(0).normal(size=(3, 32))
    assert np.abs(GRPO(GRPOConfig(adv_clip=1.5)).advantages(rewards)).max() == np.float32(1.5)
    assert np.abs(GRPO(GRPOConfig(std_floor=100.0)).advantages(rewards)).max() < 0.1


def test_objectives_are_found_by_name() -> None:
    assert isinstance(build_objective(GRPOConfig()), GRPO)
    assert "grpo" in OBJECTIVES
    with pytest.raises(ConfigError, match=r"objective\.name: 'ppo' cannot be used; use one of: grpo"):
        build_objective(GRPOConfig().model_copy(update={"name": "ppo"}))


def test_misuse_is_a_bug_with_a_message(tiny_pipeline: Path) -> None:
    policy, stepper, rollout = drawn(tiny_pipeline, SamplingConfig(steps=3, group_size=2, guidance_scale=GUIDANCE))
    t = rollout.trajectory
    with pytest.raises(ValueError, match="positions is empty"):
        GRPO(GRPOConfig()).loss(policy, stepper, t, np.zeros(2), [], GUIDANCE)
    with pytest.raises(ValueError, match=r"\(5,\) advantages for a group of 2"):
        GRPO(GRPOConfig()).loss(policy, stepper, t, np.zeros(5), [0], GUIDANCE)
    with pytest.raises(ValueError, match="call prepare before the first update"):
        GRPO(GRPOConfig(anchor="proximal", updates_per_batch=2)).loss(policy, stepper, t, np.zeros(2), [0], GUIDANCE)


@pytest.mark.parametrize(
    "bad",
    [
        {"clip_range": 0.0},
        {"adv_clip": 0.0},
        {"kl_coef": -1.0},
        {"std": "global"},
        {"updates_per_batch": 0},
        {"max_weight": 0.5},
        {"kl_threshold": 0.0},
        {"kl_threshold": float("inf")},
    ],
)
def test_impossible_objective_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        GRPOConfig.model_validate(bad)


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"trust": "kl_mask", "updates_per_batch": 2}, "trust 'kl_mask' needs .* set anchor to 'proximal'"),
        ({"ratio": "guarded"}, "ratio 'guarded' needs .* set anchor to 'proximal'"),
        (
            {"anchor": "proximal", "trust": "kl_mask", "ratio": "guarded", "updates_per_batch": 2},
            "'kl_mask' does not clip: choose one",
        ),
        ({"anchor": "proximal", "trust": "kl_mask"}, "set updates_per_batch to 2 or more"),
    ],
)
def test_settings_that_exclude_each_other_are_refused_in_a_recipe(
    tiny_recipe: RecipeFactory, settings: dict[str, object], remedy: str
) -> None:
    recipe = tiny_recipe({f"objective.{key}": value for key, value in settings.items()})
    with pytest.raises(ConfigError, match=f"objective.*{remedy}"):
        load_recipe(recipe)


@pytest.mark.parametrize(
    "settings",
    [
        {"anchor": "proximal"},
        {"anchor": "proximal", "updates_per_batch": 2, "trust": "kl_mask", "kl_threshold": 1e-6},
        {"anchor": "proximal", "ratio": "guarded"},
    ],
)
def test_settings_that_go_together_are_taken(tiny_recipe: RecipeFactory, settings: dict[str, object]) -> None:
    recipe = load_recipe(tiny_recipe({f"objective.{key}": value for key, value in settings.items()}))
    assert {key: getattr(recipe.objective, key) for key in settings} == settings
