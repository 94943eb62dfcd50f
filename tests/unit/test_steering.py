"""The steering reward: its identities, its anchors, and that pictures reach it unharmed."""

import functools
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from learner.advantages import group_advantages
from raysteer.errors import ConfigError
from rewards.anchors import load_anchors, safety_direction, shipped_anchor_sets
from rewards.base import REWARDS, Scores, build_reward
from rewards.config import AnchorSet, ClipConfig, RewardConfig
from rewards.steering import SteeringReward, steer
from tests.tiny import tiny_clip

CLIP = ClipConfig(model=f"local-dir:{tiny_clip()}")
PROMPTS = ["a red circle", "a toxic sign", "a house", "a hazard"]


def reward(**overrides: object) -> SteeringReward:
    return _built(RewardConfig.model_validate({"clip": CLIP, **overrides}))


_built = functools.cache(SteeringReward)  # a reward has no state but its text cache


def images(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 32, 32, 3), np.uint8)


def unit(n: int, d: int = 32, seed: int = 0) -> np.ndarray:
    z = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def test_alpha_zero_is_plain_alignment_to_the_bit() -> None:
    scores = reward(alpha=0.0).score(images(4), PROMPTS)
    assert np.array_equal(scores.total, scores.parts["alignment"])
    plain = build_reward(RewardConfig(name="clip", clip=CLIP)).score(images(4), PROMPTS)
    assert np.array_equal(scores.total, plain.total)


def test_alpha_above_zero_is_not_plain_alignment() -> None:
    scores = reward(alpha=0.5).score(images(4), PROMPTS)
    assert np.abs(scores.total - scores.parts["alignment"]).max() > 1e-3


def test_inside_a_group_steering_is_alignment_plus_alpha_times_image_safety() -> None:
    scores = reward(alpha=0.7).score(images(8), ["a toxic sign"] * 8)
    linear = scores.parts["alignment"].astype(np.float64) + 0.7 * scores.parts["image_safety"]
    np.testing.assert_allclose(group_advantages(scores.total[None]), group_advantages(linear[None]), atol=1e-4)


def test_the_score_of_an_image_does_not_depend_on_its_batch() -> None:
    many, prompts = images(100), [PROMPTS[k % 4] for k in range(100)]
    r = reward()
    together = r.score(many, prompts)
    for k in (0, 7, 99):
        alone = r.score(many[k : k + 1], prompts[k : k + 1])
        assert alone.total[0] == together.total[k]
        assert all(alone.parts[name][0] == together.parts[name][k] for name in together.parts)


def test_swapping_the_anchor_lists_negates_the_direction_which_has_unit_length() -> None:
    anchors = load_anchors("compact")
    v = reward(anchors=anchors).v_safe
    swapped = reward(anchors=AnchorSet(safe=anchors.unsafe, unsafe=anchors.safe)).v_safe
    assert np.array_equal(v, -swapped)
    assert v.dtype == np.float32
    assert np.linalg.norm(v) == pytest.approx(1.0, abs=1e-6)


def test_unsafe_only_points_away_from_the_mean_of_the_unsafe_phrases() -> None:
    r = reward(anchors="unsafe_only")
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


def test_a_png_scores_the_same_and_a_jpeg_does_not() -> None:
    r, original = reward(), images(2)

    def through(file_format: str) -> np.ndarray:
        pictures = []
        for image in original:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, file_format)
            pictures.append(np.asarray(Image.open(buffer)))
        return np.stack(pictures)

    direct = r.score(original, PROMPTS[:2]).total
    assert np.array_equal(r.score(through("PNG"), PROMPTS[:2]).total, direct)
    assert np.abs(r.score(through("JPEG"), PROMPTS[:2]).total - direct).min() > 1e-4


# ---- anchors -----------------------------------------------------------------------------------------------


def test_the_shipped_sets_are_the_published_ones() -> None:
    assert shipped_anchor_sets() == ("compact", "unsafe_only")
    compact, unsafe_only = load_anchors("compact"), load_anchors("unsafe_only")
    assert (len(compact.safe), len(compact.unsafe)) == (5, 3)
    assert unsafe_only == AnchorSet(safe=(), unsafe=compact.unsafe)


def test_anchors_come_from_a_yaml_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("safe: [a safe place]\nunsafe: [a hazard, poison]\n")
    assert load_anchors(str(file)) == AnchorSet(safe=("a safe place",), unsafe=("a hazard", "poison"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("safe: [a]\nunsafe: []\n", "no unsafe phrase"),
        ("safe: []\nunsafe: []\n", "no unsafe phrase"),
        ("safe: [a]\n", "unsafe: Field required"),
        ("safe: [a]\nunsafe: [a]\n", "same phrases"),
        ("safe: [a]\nunsafe: ['  ']\n", "blank"),
        ("safe: [a]\nunsafe: [b]\nother: [c]\n", "other: Extra inputs"),
        ("safe: [a\n", "not valid YAML"),
        ("", "the file: Input should be"),
    ],
)
def test_an_empty_or_degenerate_anchor_file_is_named_never_nan(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"reward\.anchors: .*mine\.yaml.*{message}") as caught:
        load_anchors(str(file))
    assert "\n" not in str(caught.value)


def test_an_unknown_anchor_set_names_those_we_ship() -> None:
    with pytest.raises(ConfigError, match=r"reward\.anchors: 'kompact' .*compact, unsafe_only"):
        load_anchors("kompact")


def test_anchors_that_embed_to_one_point_have_no_direction() -> None:
    z = unit(2)
    with pytest.raises(ConfigError, match=r"'twins' cannot be used; .*same point"):
        safety_direction(z, z[::-1], "twins")
    with pytest.raises(ConfigError, match="no unsafe phrase"):
        safety_direction(z, z[:0], "empty")
    with pytest.raises(ConfigError, match=r"reward\.anchors.*same point"):
        reward(anchors=AnchorSet(safe=("A TOXIC SIGN",), unsafe=("a toxic  sign",)))


# ---- registry and parts ------------------------------------------------------------------------------------


class BrightnessReward:
    """What a user's own reward file looks like."""

    def __init__(self, cfg: RewardConfig, device: str = "cpu") -> None:
        self.alpha = cfg.alpha

    def score(self, images: np.ndarray, prompts: list[str]) -> Scores:
        return Scores(images.mean((1, 2, 3)).astype(np.float32), {})


def find_bright(images: np.ndarray) -> np.ndarray:
    return (images.mean((1, 2, 3)) > 127).astype(np.float32)


def broken_detector(images: np.ndarray) -> float:
    return 1.0


def test_a_reward_of_ones_own_is_an_import_path_in_the_recipe() -> None:
    mine = build_reward(RewardConfig(name=f"{__name__}:BrightnessReward", clip=CLIP))
    np.testing.assert_allclose(mine.score(images(2), PROMPTS[:2]).total, images(2).mean((1, 2, 3)), rtol=1e-6)
    assert set(REWARDS) == {"steering", "clip"}


def test_a_detector_is_reported_and_never_rewarded() -> None:
    pictures = np.stack([np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)])
    watched = build_reward(RewardConfig(clip=CLIP, detector=f"{__name__}:find_bright")).score(pictures, PROMPTS[:2])
    plain = reward().score(pictures, PROMPTS[:2])
    assert watched.parts["inappropriate"].tolist() == [0.0, 1.0]
    assert np.array_equal(watched.total, plain.total)
    assert set(watched.parts) == {"alignment", "image_safety", "inappropriate"}


def test_a_detector_of_the_wrong_shape_is_found_at_once() -> None:
    r = build_reward(RewardConfig(clip=CLIP, detector=f"{__name__}:broken_detector"))
    with pytest.raises(ValueError, match=r"broken_detector returned shape \(\)"):
        r.score(images(2), PROMPTS[:2])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"detector": "no.such.module:f"}, r"reward\.detector: .*no module 'no\.such\.module'"),
        ({"detector": f"{__name__}:missing"}, r"reward\.detector: .*has no 'missing'"),
        ({"name": "no_such_module:Reward"}, r"reward\.name: .*no module 'no_such_module'"),
    ],
)
def test_an_import_path_that_leads_nowhere_is_named(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_reward(RewardConfig.model_validate({"clip": CLIP, **overrides}))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"name": "stearing"}, "use one of steering, clip"),
        ({"alpha": -0.1}, "greater than or equal to 0"),
        ({"alpha": float("inf")}, "finite"),
        ({"detector": "module.function"}, "write 'module:function'"),
        ({"mode": "rotate"}, "'translate' or 'project'"),
    ],
)
def test_impossible_reward_settings_are_refused_with_the_remedy(bad: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RewardConfig.model_validate({"clip": CLIP, **bad})


def test_scores_of_the_wrong_kind_are_a_bug() -> None:
    with pytest.raises(ValueError, match="total: expected float32"):
        Scores(np.zeros(3), {})
    with pytest.raises(ValueError, match="part: expected float32"):
        Scores(np.zeros(3, np.float32), {"part": np.zeros(2, np.float32)})
