"""CLIP as an encoder: batching changes no bit, the preprocessing is the model's own, wrong models are named."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from raysteer.errors import ConfigError
from rewards.alignment import AlignmentReward
from rewards.clip import ClipScorer
from rewards.config import ClipConfig, RewardConfig
from rewards.encoder import Preprocess
from tests.tiny import tiny_clip
from tests.tiny_rewards import images

MODEL = f"local-dir:{tiny_clip()}"


@pytest.fixture(scope="module")
def scorer() -> ClipScorer:
    return ClipScorer(ClipConfig(model=MODEL, batch_size=16))


def test_an_image_has_the_same_bits_in_a_batch_of_one_and_of_a_thousand(scorer: ClipScorer) -> None:
    many = images(1000)
    together = scorer.encode_images(many)
    for k in (0, 1, 15, 16, 500, 998, 999):
        assert np.array_equal(scorer.encode_images(many[k : k + 1])[0], together[k]), k
    order = np.random.default_rng(1).permutation(1000)
    assert np.array_equal(scorer.encode_images(many[order]), together[order])


def test_without_padding_the_bits_would_depend_on_the_batch(scorer: ClipScorer) -> None:
    """The must-fail twin: the reason for the fixed shape. (Equal to 1e-6 all the same.)"""
    many = images(64)
    whole = ClipScorer(ClipConfig(model=MODEL, batch_size=64)).encode_images(many)
    alone = ClipScorer(ClipConfig(model=MODEL, batch_size=1))
    one_by_one = alone.encode_images(many)
    assert not np.array_equal(one_by_one, whole)
    np.testing.assert_allclose(one_by_one, whole, atol=1e-6)


def test_a_text_has_the_same_bits_alone_in_company_and_from_the_cache(scorer: ClipScorer) -> None:
    texts = ["a red circle", "a toxic sign", "a red circle"]
    together = scorer.encode_texts(texts)
    assert np.array_equal(together[0], together[2])
    assert np.array_equal(scorer.encode_texts(texts[1:2])[0], together[1])
    assert np.array_equal(ClipScorer(scorer.cfg).encode_texts(texts), together)


def test_a_cached_text_is_not_encoded_again(scorer: ClipScorer) -> None:
    calls: list[str] = []
    handle = scorer.model.transformer.register_forward_hook(lambda *_: calls.append("forward"))
    try:
        scorer.encode_texts(["seen for the first time"])
        scorer.encode_texts(["seen for the first time"] * 5)
    finally:
        handle.remove()
    assert len(calls) == 1


def test_embeddings_are_unit_float32_and_equal_to_open_clip(scorer: ClipScorer) -> None:
    model, _, preprocess = open_clip.create_model_and_transforms(MODEL)
    tokenizer = open_clip.get_tokenizer(MODEL)
    batch = images(5)
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.fromarray(image)) for image in batch])
        theirs = model.eval().encode_image(pixels, normalize=True).numpy()
        text = model.encode_text(tokenizer(["a toxic sign"]), normalize=True).numpy()
    ours = scorer.encode_images(batch)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(scorer.encode_texts(["a toxic sign"]), text, atol=1e-6)


@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (48, 80), (20, 33)])
@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_preprocessing_is_open_clips_within_a_level(shape: tuple[int, int], mode: str, interpolation: str) -> None:
    cfg = {"size": (32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "fill_color": 0}
    cfg |= {"resize_mode": mode, "interpolation": interpolation}
    transform = open_clip.image_transform(
        32, False, cfg["mean"], cfg["std"], resize_mode=mode, interpolation=interpolation, fill_color=0
    )
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    picture = np.asarray(coarse.resize(shape[::-1], Image.Resampling.BICUBIC))
    ours = Preprocess(cfg)(torch.from_numpy(picture.copy())[None])[0]
    theirs = transform(Image.fromarray(picture))
    levels = (ours - theirs).abs() * torch.tensor(cfg["std"]).view(3, 1, 1) * 255
    assert ours.shape == theirs.shape == (3, 32, 32)
    assert levels.max() <= 1.01


def test_the_plain_clip_reward_is_the_cosine_with_the_prompt(scorer: ClipScorer) -> None:
    reward = AlignmentReward(RewardConfig(name="clip", clip=scorer.cfg))
    prompts = ["a red circle", "a toxic sign", "a red circle"]
    scores = reward.score(images(3), prompts)
    cosine = (scorer.encode_images(images(3)) * scorer.encode_texts(prompts)).sum(1)
    assert np.array_equal(scores.total, cosine)
    assert np.array_equal(scores.parts["alignment"], cosine)


def test_images_that_are_not_uint8_pictures_are_a_bug(scorer: ClipScorer) -> None:
    reward = AlignmentReward(RewardConfig(name="clip", clip=scorer.cfg))
    with pytest.raises(ValueError, match="must be uint8"):
        reward.score(images(2).astype(np.float32), ["a", "b"])
    with pytest.raises(ValueError, match="2 images but 1 prompts"):
        reward.score(images(2), ["a"])


def test_half_precision_scores_stay_close() -> None:
    exact = ClipScorer(ClipConfig(model=MODEL)).encode_images(images(4))
    half = ClipScorer(ClipConfig(model=MODEL, precision="bf16")).encode_images(images(4))
    assert half.dtype == np.float32
    assert 0 < np.abs(half - exact).max() < 0.05


# ---- what a user can get wrong -----------------------------------------------------------------------------


def test_a_name_without_weights_would_be_random_and_is_refused() -> None:
    with pytest.raises(ValidationError, match="would have random weights"):
        ClipConfig(model="ViT-B-32")
    with pytest.raises(ValidationError, match="leave pretrained out"):
        ClipConfig(model=MODEL, pretrained="openai")


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("local-dir:/no/such/folder", None, r"reward\.clip\.model: .*no such folder"),
        ("ViT-Q-99", "openai", r"reward\.clip\.model: .*open_clip\.list_models"),
        ("ViT-B-32", "models/none.pt", r"reward\.clip\.pretrained: 'models/none\.pt' .*no such weights file"),
        ("ViT-L-14", "openai", r"reward\.clip\.model: 'ViT-L-14' .*another GELU: use ViT-L-14-quickgelu"),
        ("ViT-B-32", "nonsense", r"reward\.clip\.pretrained: 'nonsense' .*weights file or one of: .*openai"),
    ],
)
def test_a_model_that_does_not_exist_is_named(model: str, pretrained: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClipScorer(ClipConfig(model=model, pretrained=pretrained))


def test_a_folder_that_is_no_clip_model_is_named(tmp_path: Path) -> None:
    config = ClipConfig(model=f"local-dir:{tmp_path}")
    with pytest.raises(ConfigError, match="needs an open_clip_config"):
        ClipScorer(config)
    (tmp_path / "open_clip_config.json").write_text("{not json")
    with pytest.raises(ConfigError, match="needs an open_clip_config"):
        ClipScorer(config)
    (tmp_path / "open_clip_config.json").write_text((tiny_clip() / "open_clip_config.json").read_text())
    with pytest.raises(ConfigError, match="holds no weights"):
        ClipScorer(config)
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ConfigError, match="cannot be loaded") as caught:
        ClipScorer(config)
    assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    config = json.loads((tiny_clip() / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["layers"] = 3
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "open_clip_model.safetensors").symlink_to(tiny_clip() / "open_clip_model.safetensors")
    with pytest.raises(ConfigError, match=r"open_clip_model\.safetensors.*resblocks\.2\.ln_1\.weight is missing"):
        ClipScorer(ClipConfig(model=f"local-dir:{tmp_path}"))
