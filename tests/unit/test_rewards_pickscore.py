"""PickScore: the raw score of a transformers CLIPModel, from local files alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raysteer.errors import ConfigError
from rewards.base import build_reward, check_rewards
from rewards.config import RewardConfig
from rewards.pickscore import PickScoreReward
from tests.tiny_rewards import PROMPTS, images, tiny_pickscore


def config(model: Path | str, **own: Any) -> RewardConfig:
    return RewardConfig.model_validate({"name": "pickscore", "pickscore": {"model": str(model), **own}})


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pickscore(), tmp_path / "pickscore"))


def test_the_score_is_that_of_the_authors_recipe() -> None:
    """exp(logit_scale) times the cosine, as computed by transformers' own processor and model."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    pictures = images(4)
    ours = build_reward(config(tiny_pickscore())).score(pictures, PROMPTS)
    model = CLIPModel.from_pretrained(tiny_pickscore()).eval()
    tokens = CLIPTokenizer.from_pretrained(tiny_pickscore())(list(PROMPTS), padding=True, return_tensors="pt")
    processor = CLIPImageProcessor.from_pretrained(tiny_pickscore())
    pixels = processor([Image.fromarray(picture) for picture in pictures], return_tensors="pt")
    with torch.no_grad():
        theirs = model(**tokens, **pixels).logits_per_image.diagonal().numpy()
    np.testing.assert_allclose(ours.total, theirs, rtol=1e-4, atol=1e-3)
    assert np.array_equal(ours.parts["pickscore"], ours.total)


def test_it_is_the_raw_score_and_not_the_cosine() -> None:
    reward = PickScoreReward(config(tiny_pickscore()))
    cosine = (reward.encoder.encode_images(images(4)) * reward.encoder.encode_texts(PROMPTS)).sum(1)
    assert reward.encoder.scale == pytest.approx(np.exp(4.6), rel=1e-6)
    assert np.array_equal(reward.score(images(4), PROMPTS).total, cosine * reward.encoder.scale)


def test_the_scale_is_taken_from_the_weights(copied: Path) -> None:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(copied)
    model.logit_scale.data.fill_(0.0)
    model.save_pretrained(copied)
    plain = build_reward(config(copied)).score(images(2), PROMPTS[:2]).total
    scaled = build_reward(config(tiny_pickscore())).score(images(2), PROMPTS[:2]).total
    np.testing.assert_allclose(scaled, plain * np.exp(4.6), rtol=1e-5)


def test_a_cached_prompt_is_not_encoded_again() -> None:
    reward = PickScoreReward(config(tiny_pickscore()))
    calls: list[int] = []
    handle = reward.encoder.model.text_model.register_forward_hook(lambda *_: calls.append(1))
    try:
        reward.score(images(6), [PROMPTS[0], PROMPTS[1]] * 3)
        reward.score(images(6), [PROMPTS[0]] * 6)
    finally:
        handle.remove()
    assert len(calls) == 2


def test_a_prompt_beyond_the_tokenizers_limit_is_scored() -> None:
    scores = build_reward(config(tiny_pickscore())).score(images(1), ["a red circle in a blue square " * 20])
    assert np.isfinite(scores.total).all()


def test_preprocessing_is_the_models_own(copied: Path) -> None:
    file = copied / "preprocessor_config.json"
    before = build_reward(config(copied)).score(images(2, size=48), PROMPTS[:2]).total
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.1, 0.9, 0.5]}))
    after = build_reward(config(copied)).score(images(2, size=48), PROMPTS[:2]).total
    assert (before != after).all()
    file.unlink()  # CLIP's standard, which is what it said at first
    assert np.array_equal(build_reward(config(copied)).score(images(2, size=48), PROMPTS[:2]).total, before)


def test_tokenizer_and_preprocessor_may_come_from_another_folder(copied: Path, tmp_path: Path) -> None:
    expected = build_reward(config(copied)).score(images(2), PROMPTS[:2]).total
    (tmp_path / "processor").mkdir()
    for file in copied.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.move(file, tmp_path / "processor" / file.name)
    (tmp_path / "processor" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"reward\.pickscore\.processor: missing .*no tokenizer.*laion/CLIP-ViT-H-14"):
        build_reward(config(copied))
    apart = build_reward(config(copied, processor=str(tmp_path / "processor"))).score(images(2), PROMPTS[:2])
    assert np.array_equal(apart.total, expected)


def test_half_precision_stays_close() -> None:
    exact = build_reward(config(tiny_pickscore())).score(images(4), PROMPTS).total
    half = build_reward(config(tiny_pickscore(), precision="bf16")).score(images(4), PROMPTS).total
    assert 0 < np.abs(half - exact).max() < 3.0  # of about a hundred


# ---- what a user can get wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("act", [build_reward, check_rewards], ids=["build", "check"])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/no/such/folder", r"'/no/such/folder' .*no such folder"),
        ("nobody-zz/not-a-model", r"'nobody-zz/not-a-model' .*local hub cache; try: hf download nobody-zz/not-a-model"),
    ],
)
def test_a_model_that_is_nowhere_is_named(act: Any, model: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"reward\.pickscore\.model: {message}"):
        act(config(model))


@pytest.mark.parametrize("act", [build_reward, check_rewards], ids=["build", "check"])
def test_a_folder_that_holds_no_clip_model_is_named(act: Any, copied: Path) -> None:
    (copied / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConfigError, match=r"reward\.pickscore\.model: .*no transformers CLIPModel"):
        act(config(copied))
    (copied / "config.json").write_text("{torn")
    with pytest.raises(ConfigError, match=r"reward\.pickscore\.model: .*not valid JSON"):
        act(config(copied))
    (copied / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"reward\.pickscore\.model: .*no transformers CLIPModel"):
        act(config(copied))


@pytest.mark.parametrize("act", [build_reward, check_rewards], ids=["build", "check"])
def test_a_folder_without_weights_is_named(act: Any, copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"reward\.pickscore\.model: .*no weights"):
        act(config(copied))


def test_torn_weights_are_named(copied: Path) -> None:
    (copied / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ConfigError, match=r"reward\.pickscore\.model: .*cannot be loaded") as caught:
        build_reward(config(copied))
    assert "\n" not in str(caught.value)


def test_weights_that_transformers_would_fill_with_random_numbers_are_refused(copied: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(copied / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"reward\.pickscore\.model: .*visual_projection\.weight is missing"):
        build_reward(config(copied))


def test_weights_of_another_shape_are_named(copied: Path) -> None:
    described = json.loads((copied / "config.json").read_text())
    described["projection_dim"] = 20
    (copied / "config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"reward\.pickscore\.model: .*cannot be loaded"):
        build_reward(config(copied))
