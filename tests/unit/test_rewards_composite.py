"""Several rewards as one: names, weights, sums that can be recomputed, models loaded and images encoded once."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from actors.leases import Outcome
from actors.reward_worker import RewardWorker
from raysteer.errors import ConfigError
from rewards.base import REWARDS, Scores, build_reward, check_rewards
from rewards.composite import CompositeReward, RewardFailed, weighted_sum
from rewards.config import ClipConfig, RewardConfig, RewardTerm
from tests.tiny_rewards import FOLDER, PROMPTS, images, named_clip, tiny_q16_prompts

CLIP = ClipConfig(model=FOLDER)
HPS = {"name": "hps", "weight": 0.3, "clip": named_clip()}
JPEG = {"name": "jpeg_compressibility", "weight": 0.017}
Q16 = {"name": "q16", "weight": -0.7, "clip": CLIP, "q16_prompts": str(tiny_q16_prompts())}


def config(*terms: dict[str, Any], **main: Any) -> RewardConfig:
    return RewardConfig.model_validate({"clip": CLIP, "terms": terms, **main})


class BrightnessReward:
    """What a user's own reward file looks like."""

    def __init__(self, cfg: RewardTerm, device: str = "cpu") -> None:
        self.alpha = cfg.alpha

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> Scores:
        return Scores(images.mean((1, 2, 3)).astype(np.float32), {})


class Explodes(BrightnessReward):
    def score(self, images: np.ndarray, prompts: Sequence[str]) -> Scores:
        raise KeyError("no such prompt")


class NotANumber(BrightnessReward):
    def score(self, images: np.ndarray, prompts: Sequence[str]) -> Scores:
        return Scores(np.full(len(images), np.nan, np.float32), {})


class TooFew(BrightnessReward):
    def score(self, images: np.ndarray, prompts: Sequence[str]) -> Scores:
        return Scores(np.zeros(1, np.float32), {})


def find_bright(images: np.ndarray) -> np.ndarray:
    return (images.mean((1, 2, 3)) > 127).astype(np.float32)


def broken_detector(images: np.ndarray) -> float:
    return 1.0


# ---- sums and names ----------------------------------------------------------------------------------------


def test_the_total_is_the_weighted_sum_of_the_parts_to_the_bit() -> None:
    cfg = config(HPS, JPEG, Q16, weight=1.1)
    scores = build_reward(cfg).score(images(5), (*PROMPTS, "a cat"))
    expected = np.zeros(5)
    for name, weight in {"steering": 1.1, "hps": 0.3, "jpeg_compressibility": 0.017, "q16": -0.7}.items():
        expected = expected + weight * scores.parts[name].astype(np.float64)
    assert np.array_equal(scores.total, expected.astype(np.float32))
    assert np.array_equal(scores.total, weighted_sum(scores.parts, {t.component: t.weight for _, t in cfg.located()}))


def test_parts_are_the_raw_scores_whatever_the_weights_and_the_mix() -> None:
    together = build_reward(config(HPS, JPEG, Q16, weight=1.1, mix="group")).score(images(4), PROMPTS)
    for term in (HPS, JPEG, Q16):
        alone = build_reward(RewardConfig.model_validate(term)).score(images(4), PROMPTS)
        assert np.array_equal(together.parts[str(term["name"])], alone.parts[str(term["name"])])
        assert np.array_equal(alone.total, weighted_sum(alone.parts, {str(term["name"]): float(str(term["weight"]))}))


def test_a_single_reward_of_weight_one_is_its_own_total() -> None:
    scores = build_reward(config()).score(images(4), PROMPTS)
    assert np.array_equal(scores.total, scores.parts["steering"])
    assert set(scores.parts) == {"steering", "alignment", "image_safety"}


def test_what_terms_report_beside_their_score_does_not_collide() -> None:
    plain = {"name": "clip", "clip": named_clip()}
    scores = build_reward(config(plain, HPS)).score(images(2), PROMPTS[:2])
    assert set(scores.parts) == {"steering", "alignment", "image_safety", "clip", "clip.alignment", "hps"}


def test_two_rewards_that_report_one_name_are_a_bug() -> None:
    class Odd(BrightnessReward):
        def score(self, images: np.ndarray, prompts: Sequence[str]) -> Scores:
            total = np.zeros(len(images), np.float32)
            return Scores(total, {"other": total})

    term = RewardTerm(name="clip")
    both = CompositeReward({"odd": (1.0, Odd(term)), "other": (1.0, BrightnessReward(term))})
    with pytest.raises(ValueError, match="two rewards report the part 'other'"):
        both.score(images(2), PROMPTS[:2])


def test_one_model_is_loaded_once_and_sees_each_image_once() -> None:
    clip = named_clip(batch_size=8)
    steering_and_hps = config({"name": "hps", "clip": clip}, clip=clip)
    reward = build_reward(steering_and_hps)
    assert isinstance(reward, CompositeReward)
    first, second = (held.clip for _, held in reward.rewards.values())  # type: ignore[attr-defined]
    assert first is second
    calls: list[int] = []
    handle = first.model.visual.register_forward_hook(lambda *_: calls.append(1))
    try:
        pictures = images(8)
        before = reward.score(pictures, PROMPTS * 2)
        assert len(calls) == 1
        pictures[0] = 0  # what is remembered lasts for one call only
        assert reward.score(pictures, PROMPTS * 2).total[0] != before.total[0]
        assert len(calls) == 2
    finally:
        handle.remove()


# ---- mixing ------------------------------------------------------------------------------------------------


def test_the_mixture_names_parts_only_when_each_is_normalised_in_its_group() -> None:
    assert config(HPS, JPEG, weight=2.0).mixture() is None
    own = {"name": f"{__name__}:BrightnessReward", "weight": 0.5}
    cfg = config(HPS, own, weight=2.0, mix="group")
    assert cfg.mixture() == {"steering": 2.0, "hps": 0.3, "BrightnessReward": 0.5}
    assert set(cfg.mixture() or ()) <= set(build_reward(cfg).score(images(2), PROMPTS[:2]).parts)


# ---- failures ----------------------------------------------------------------------------------------------


def outcome(cfg: RewardConfig) -> Outcome:
    return asyncio.run(RewardWorker("w", cfg, "cpu").score(images(2), PROMPTS[0]))


def test_a_term_that_raises_is_named() -> None:
    failed = outcome(config(HPS, {"name": f"{__name__}:Explodes"}))
    assert failed.kind == "retryable"
    assert failed.reason == "reward_failed:RewardFailed"
    assert "Explodes: KeyError: 'no such prompt'" in failed.detail


def test_a_term_that_gives_nan_is_named_and_poisons_the_group() -> None:
    poisoned = outcome(config(HPS, {"name": f"{__name__}:NotANumber"}))
    assert poisoned.kind == "poisoned"
    assert poisoned.reason == "reward_not_finite:NotANumber"
    assert poisoned.reward is None


def test_terms_that_are_finite_are_scored() -> None:
    scored = outcome(config(HPS, JPEG))
    assert scored.kind == "scored"
    assert scored.reward is not None and np.isfinite(scored.reward).all()
    assert set(scored.parts) == {"steering", "alignment", "image_safety", "hps", "jpeg_compressibility"}


def test_a_term_that_returns_too_few_scores_is_named() -> None:
    with pytest.raises(RewardFailed, match="TooFew: it returned 1 scores for 3 images"):
        build_reward(config({"name": f"{__name__}:TooFew"})).score(images(3), PROMPTS[:3])


# ---- registry and detector ---------------------------------------------------------------------------------


def test_a_reward_of_ones_own_is_an_import_path_in_the_recipe() -> None:
    mine = build_reward(RewardConfig(name=f"{__name__}:BrightnessReward"))
    scores = mine.score(images(2), PROMPTS[:2])
    np.testing.assert_allclose(scores.total, images(2).mean((1, 2, 3)), rtol=1e-6)
    assert set(scores.parts) == {"BrightnessReward"}
    assert set(REWARDS) == {"steering", "clip", "hps", "pickscore", "jpeg_compressibility", "nudenet", "q16"}


def test_a_detector_is_reported_and_never_rewarded() -> None:
    pictures = np.stack([np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)])
    watched = build_reward(config(detector=f"{__name__}:find_bright")).score(pictures, PROMPTS[:2])
    plain = build_reward(config()).score(pictures, PROMPTS[:2])
    assert watched.parts["inappropriate"].tolist() == [0.0, 1.0]
    assert np.array_equal(watched.total, plain.total)
    assert set(watched.parts) == {"steering", "alignment", "image_safety", "inappropriate"}


def test_a_detector_of_the_wrong_shape_is_found_at_once() -> None:
    r = build_reward(config(detector=f"{__name__}:broken_detector"))
    with pytest.raises(ValueError, match=r"broken_detector returned shape \(\)"):
        r.score(images(2), PROMPTS[:2])


@pytest.mark.parametrize("build", [build_reward, check_rewards], ids=["build", "check"])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"detector": "no.such.module:f"}, r"reward\.detector: .*no module 'no\.such\.module'"),
        ({"detector": f"{__name__}:missing"}, r"reward\.detector: .*has no 'missing'"),
        ({"name": "no_such_module:Reward"}, r"reward\.name: .*no module 'no_such_module'"),
        ({"terms": [JPEG, {"name": "no_such_module:Reward"}]}, r"reward\.terms\.1\.name: .*no module 'no_such"),
        (
            {"terms": [{"name": "clip", "clip": {"model": "local-dir:/no/such"}}]},
            r"reward\.terms\.0\.clip\.model: .*no s",
        ),
        (
            {"terms": [{**Q16, "q16_prompts": "/no/prompts.p"}]},
            r"reward\.terms\.0\.q16_prompts: '/no/prompts\.p' .*no s",
        ),
        ({"anchors": "kompact"}, r"reward\.anchors: 'kompact' .*compact, scaled, unsafe_only"),
    ],
)
def test_what_is_not_there_is_named_with_its_place_before_and_when_loading(
    build: Any, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(RewardConfig.model_validate({"clip": CLIP, **overrides}))


def test_scores_of_the_wrong_kind_are_a_bug() -> None:
    with pytest.raises(ValueError, match="total: expected float32"):
        Scores(np.zeros(3), {})
    with pytest.raises(ValueError, match="part: expected float32"):
        Scores(np.zeros(3, np.float32), {"part": np.zeros(2, np.float32)})


# ---- what a recipe may say ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"name": "stearing"}, "use one of steering, clip"),
        ({"name": "module:"}, "use one of steering, clip"),
        ({"alpha": -0.1}, "greater than or equal to 0"),
        ({"alpha": float("inf")}, "finite"),
        ({"weight": float("nan")}, "finite"),
        ({"detector": "module.function"}, "write 'module:function'"),
        ({"mode": "rotate"}, "'translate' or 'project'"),
        ({"mix": "mean"}, "'sum' or 'group'"),
        ({"terms": [{**JPEG, "detector": "m:f"}]}, "Extra inputs"),
        ({"nudenet": {"classes": ["FACE_DOG"]}}, "'FACE_DOG' is no label of NudeNet 3: use some of .*ANUS_EXPOSED"),
        ({"nudenet": {"classes": []}}, "there is no class: use some of"),
        ({"nudenet": {"threshold": 1.1}}, "less than or equal to 1"),
    ],
)
def test_impossible_reward_settings_are_refused_with_the_remedy(bad: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RewardConfig.model_validate({"clip": CLIP, **bad})


@pytest.mark.parametrize(
    ("terms", "main", "message"),
    [
        ([HPS, HPS], {}, r"^reward\.terms\.1\.name: 'hps' .*there already"),
        ([{"name": "steering", "clip": CLIP}], {}, r"^reward\.terms\.0\.name: 'steering' .*there already"),
        ([{**JPEG, "weight": 0.0}], {}, r"^reward\.terms\.0\.weight: 0\.0 .*changes nothing: remove it"),
        ([JPEG], {"weight": 0.0}, r"^reward\.weight: 0\.0 .*changes nothing"),
        ([{"name": "hps"}], {}, r"^reward\.terms\.0\.clip: missing .*HPS_v2\.1_compressed\.pt"),
        ([{"name": "pickscore"}], {}, r"^reward\.terms\.0\.pickscore: missing .*pickscore: \{model: /models"),
        ([{"name": "q16", "weight": -1.0, "clip": CLIP}], {}, r"^reward\.terms\.0\.q16_prompts: missing .*prompts\.p"),
        ([{"name": "nudenet"}], {}, r"^reward\.terms\.0\.weight: 1\.0 .*a cost.*negative weight such as -1"),
        ([{**Q16, "weight": 1.0}], {}, r"^reward\.terms\.0\.weight: 1\.0 .*a cost.*negative"),
        ([], {"name": "steering", "clip": None}, r"^reward\.clip: missing or null; reward steering needs it"),
        ([], {"mix": "group"}, r"^reward\.mix: 'group' .*add reward\.terms, or set it to sum"),
    ],
)
def test_an_incomplete_or_contradictory_mixture_is_refused_at_its_place(
    terms: list[dict[str, Any]], main: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config(*terms, **main)
    assert "\n" not in str(caught.value)


def test_a_reward_without_a_model_needs_no_clip() -> None:
    assert build_reward(RewardConfig(name="jpeg_compressibility")).score(images(2), PROMPTS[:2]).total.shape == (2,)


def test_several_rewards_are_told_in_one_line() -> None:
    assert config().describe() == f"steering, alpha 0.5, translate all, CLIP {FOLDER}"
    told = config(JPEG, HPS, mix="group").describe()
    assert told.startswith(
        f"1 × (steering, alpha 0.5, translate all, CLIP {FOLDER}) + 0.017 × (jpeg_compressibility) + "
    )
    assert told.endswith("0.3 × (hps, CLIP tiny-named-clip); each normalised inside its group")
