"""The steering reward: its identities, and that nothing moves which is not meant to."""

import functools
from typing import Literal

import numpy as np
import pytest

from rewards.config import ClipConfig, RewardConfig
from rewards.steering import SteeringReward, kept_cosine, steer
from tests.tiny_rewards import FOLDER, PROMPTS, images, unit

CLIP = ClipConfig(model=FOLDER)


def reward(**overrides: object) -> SteeringReward:
    return _built(RewardConfig.model_validate({"clip": CLIP, **overrides}))


_built = functools.cache(SteeringReward)  # a reward has no state but its text cache


def test_alpha_above_zero_is_not_plain_alignment() -> None:
    scores = reward(alpha=0.5).score(images(4), PROMPTS)
    assert np.abs(scores.total - scores.parts["alignment"]).max() > 1e-3


def test_translation_is_the_published_formula() -> None:
    z, v = unit(1)[0], unit(1, seed=9)[0]
    expected = (z + 0.5 * v) / np.linalg.norm(z + 0.5 * v)
    np.testing.assert_allclose(steer(z, v, 0.5, "translate"), expected, atol=1e-6)


def test_steering_that_cancels_the_prompt_is_finite() -> None:
    v = unit(1)[0]
    assert np.isfinite(steer(-v, v, 1.0, "translate")).all()
    assert np.isfinite(steer(v, v, 0.0, "project")).all()


def test_steer_unsafe_leaves_prompts_alone_that_already_point_to_safety() -> None:
    everyone, unsafe_only = reward(), reward(steer="unsafe")
    z = everyone.clip.encode_texts(PROMPTS)
    sides = z @ everyone.v_safe
    assert (sides < 0).any(), sides
    assert (sides > 0).any(), sides
    for prompt, z_prompt, side in zip(PROMPTS, z, sides, strict=True):
        steered = unsafe_only.steered(prompt)
        assert np.array_equal(steered, everyone.steered(prompt) if side < 0 else z_prompt)


@pytest.mark.parametrize("mode", ["translate", "project"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_how_far_a_prompt_moves_follows_from_its_side_alone(
    mode: Literal["translate", "project"], alpha: float
) -> None:
    v, z = unit(1, seed=9)[0], unit(20)
    moved = np.stack([steer(row, v, alpha, mode) for row in z])
    np.testing.assert_allclose(kept_cosine(z @ v, alpha, mode), (z * moved).sum(1), atol=1e-6)


def test_more_alpha_moves_a_prompt_further() -> None:
    side = np.linspace(-0.6, 0.6, 13)
    kept = np.stack([kept_cosine(side, alpha, "translate") for alpha in (0.0, 0.3, 0.7, 1.5, 4.0)])
    assert np.array_equal(kept[0], np.ones(13))
    assert (np.diff(kept, axis=0) < 0).all()
