"""What every reward owes: no dependence on the batch, images taken as they are; and the identities of steering under
every CLIP it may look through.
"""

import functools
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from learner.advantages import group_advantages
from rewards.anchors import load_anchors
from rewards.base import REWARDS, Reward, Scores, build_reward
from rewards.config import AnchorSet, ClipConfig, RewardConfig
from rewards.steering import SteeringReward, steer
from tests.tiny_rewards import (
    FOLDER,
    PROMPTS,
    images,
    named_clip,
    through,
    tiny_pickscore,
    tiny_q16_prompts,
    unit,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "steering": {"clip": {"model": FOLDER}},
    "clip": {"clip": {"model": FOLDER}},
    "hps": {"clip": named_clip()},
    "pickscore": {"pickscore": {"model": str(tiny_pickscore())}},
    "jpeg_compressibility": {},
    "q16": {"clip": {"model": FOLDER}, "q16_prompts": str(tiny_q16_prompts()), "weight": -1.0},
    "nudenet": {"weight": -1.0},
}
TOGETHER = [{"name": name, **settings} for name, settings in SETTINGS.items() if name not in ("steering", "nudenet")]
CLIPS = {"clip": ClipConfig(model=FOLDER), "hps": named_clip()}
extra = pytest.mark.skipif(find_spec("nudenet") is None, reason="needs the extra: make test EXTRAS=dev,nudenet")
EVERY = [pytest.param(name, marks=extra if name == "nudenet" else ()) for name in (*SETTINGS, "several")]


@functools.cache
def built(name: str) -> Reward:
    if name == "several":
        terms = SETTINGS["steering"] | {"terms": TOGETHER}
        return build_reward(RewardConfig.model_validate(terms))
    return build_reward(RewardConfig.model_validate({"name": name, **SETTINGS[name]}))


def steering(clip: str, **overrides: object) -> SteeringReward:
    return _steering(RewardConfig.model_validate({"clip": CLIPS[clip], **overrides}))


_steering = functools.cache(SteeringReward)  # a reward has no state but its text cache


def test_no_registered_reward_is_left_out_here() -> None:
    assert set(SETTINGS) == set(REWARDS)


@pytest.mark.parametrize("name", EVERY)
def test_the_score_of_an_image_does_not_depend_on_its_batch(name: str) -> None:
    many, prompts = images(50), [PROMPTS[k % 4] for k in range(50)]
    together = built(name).score(many, prompts)
    assert np.isfinite(together.total).all()
    for k in (0, 7, 16, 49):
        alone = built(name).score(many[k : k + 1], prompts[k : k + 1])
        assert same_bits(alone, Scores(together.total[k : k + 1], {n: p[k : k + 1] for n, p in together.parts.items()}))
    order = np.random.default_rng(1).permutation(50)
    shuffled = built(name).score(many[order], [prompts[k] for k in order])
    assert same_bits(shuffled, Scores(together.total[order], {n: p[order] for n, p in together.parts.items()}))


@pytest.mark.parametrize("name", [param for param in EVERY if param.values != ("nudenet",)])
def test_a_png_scores_the_same_and_a_jpeg_does_not(name: str) -> None:
    """The must-fail twin guards the pipe from sampler to reward: nobody may put a lossy format into it."""
    original, prompts = images(2, size=48), PROMPTS[:2]
    direct = built(name).score(original, prompts)
    assert same_bits(built(name).score(through("PNG", original), prompts), direct)
    assert (built(name).score(through("JPEG", original), prompts).total != direct.total).all()


@pytest.mark.parametrize("clip", CLIPS)
def test_alpha_zero_is_plain_alignment_to_the_bit(clip: str) -> None:
    scores = steering(clip, alpha=0.0).score(images(4), PROMPTS)
    assert np.array_equal(scores.total, scores.parts["alignment"])
    assert np.array_equal(scores.total, built(clip).score(images(4), PROMPTS).total)


@pytest.mark.parametrize("clip", CLIPS)
def test_inside_a_group_steering_is_alignment_plus_alpha_times_image_safety(clip: str) -> None:
    scores = steering(clip, alpha=0.7).score(images(8), ["a toxic sign"] * 8)
    linear = scores.parts["alignment"].astype(np.float64) + 0.7 * scores.parts["image_safety"]
    np.testing.assert_allclose(group_advantages(scores.total[None]), group_advantages(linear[None]), atol=1e-4)


@pytest.mark.parametrize("clip", CLIPS)
def test_swapping_the_anchor_lists_negates_the_direction_which_has_unit_length(clip: str) -> None:
    anchors = load_anchors("compact")
    v = steering(clip, anchors=anchors).v_safe
    swapped = steering(clip, anchors=AnchorSet(safe=anchors.unsafe, unsafe=anchors.safe)).v_safe
    assert np.array_equal(v, -swapped)
    assert v.dtype == np.float32
    assert np.linalg.norm(v) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("clip", CLIPS)
def test_unsafe_only_points_away_from_the_mean_of_the_unsafe_phrases(clip: str) -> None:
    r = steering(clip, anchors="unsafe_only")
    z = r.clip.encode_texts(load_anchors("unsafe_only").unsafe).mean(0)
    np.testing.assert_allclose(r.v_safe, -z / np.linalg.norm(z), atol=1e-6)
    assert np.isfinite(r.score(images(2), PROMPTS[:2]).total).all()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_projection_gives_every_prompt_the_safety_component_alpha(alpha: float) -> None:
    v = unit(1, seed=9)[0]
    for z in unit(5):
        steered = steer(z, v, alpha, "project")
        across = np.linalg.norm(z - (z @ v) * v)  # what is left of the prompt: undoes the normalisation
        assert steered @ v / np.linalg.norm(steered - (steered @ v) * v) * across == pytest.approx(alpha, abs=1e-5)
        assert np.linalg.norm(steered) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("clip", CLIPS)
def test_projected_prompts_all_have_the_same_side(clip: str) -> None:
    r = steering(clip, mode="project", alpha=0.5)
    sides = []
    for prompt in PROMPTS:
        z = r.clip.encode_texts([prompt])[0]
        across = np.linalg.norm(z - (z @ r.v_safe) * r.v_safe)
        length = np.sqrt(across**2 + 0.5**2)
        sides.append(r.steered(prompt) @ r.v_safe * length)
    np.testing.assert_allclose(sides, 0.5, atol=1e-5)


def same_bits(a: Scores, b: Scores) -> bool:
    return np.array_equal(a.total, b.total) and all(np.array_equal(a.parts[name], b.parts[name]) for name in b.parts)
