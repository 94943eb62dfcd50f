"""Rewards without or with optional parts: JPEG size, Q16, NudeNet. Costs lie in [0, 1], 1 = harmful."""

import pickle
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_file

from raysteer.errors import ConfigError
from rewards.base import build_reward, check_rewards
from rewards.clip import ClipScorer
from rewards.config import ClipConfig, NudeNetConfig, RewardConfig
from rewards.jpeg import jpeg_bytes
from rewards.nudenet import LABELS, nudity
from rewards.q16 import inappropriate, load_prompts
from tests.tiny_rewards import FOLDER, PROMPTS, images, tiny_q16_prompts, unit

CLIP = ClipConfig(model=FOLDER)


# ---- JPEG --------------------------------------------------------------------------------------------------


def test_jpeg_compressibility_is_minus_the_kilobytes_at_quality_95(tmp_path: Path) -> None:
    pictures = images(3, size=64)
    scores = build_reward(RewardConfig(name="jpeg_compressibility")).score(pictures, PROMPTS[:3])
    for picture, score in zip(pictures, scores.total, strict=True):
        Image.fromarray(picture).save(tmp_path / "a.jpg", quality=95)
        assert score == np.float32(-(tmp_path / "a.jpg").stat().st_size / 1000)


def test_a_smoother_image_compresses_better() -> None:
    rough = images(1, size=64)[0]
    smooth = np.asarray(Image.fromarray(rough).filter(ImageFilter.GaussianBlur(3)))
    sizes = [jpeg_bytes(image) for image in (rough, smooth, np.full_like(rough, 128))]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


# ---- Q16 ---------------------------------------------------------------------------------------------------


def q16(prompts: Path | str, **overrides: Any) -> RewardConfig:
    return RewardConfig.model_validate(
        {"name": "q16", "weight": -1.0, "clip": CLIP, "q16_prompts": str(prompts), **overrides}
    )


def test_q16_is_the_softmax_of_a_hundred_cosines() -> None:
    pictures = images(6)
    scores = build_reward(q16(tiny_q16_prompts())).score(pictures, ["whatever"] * 6)
    z = torch.from_numpy(ClipScorer(CLIP).encode_images(pictures)).double()
    prompts = torch.nn.functional.normalize(torch.from_numpy(np.load(tiny_q16_prompts())).double(), dim=-1)
    expected = (100 * z @ prompts.T).softmax(-1)[:, 1]
    np.testing.assert_allclose(scores.parts["q16"], expected.numpy(), atol=1e-5)
    assert scores.parts["q16"].std() > 1e-3
    assert np.array_equal(scores.total, -scores.parts["q16"])


def test_q16_is_sure_and_finite_at_its_extremes() -> None:
    prompts = unit(2)
    z = np.stack([prompts[1], prompts[0], (prompts[0] + prompts[1]) / np.linalg.norm(prompts[0] + prompts[1])])
    np.testing.assert_allclose(inappropriate(z, prompts), [1.0, 0.0, 0.5], atol=1e-3)
    swapped = inappropriate(z, prompts[::-1])
    np.testing.assert_allclose(swapped, 1.0 - inappropriate(z, prompts), atol=1e-6)


@pytest.mark.parametrize("form", ["npy", "safetensors", "torch", "published", "published half", "old protocol"])
def test_prompts_are_read_in_every_form_they_come_in(tmp_path: Path, form: str) -> None:
    array = np.load(tiny_q16_prompts())
    file = tmp_path / {"npy": "p.npy", "safetensors": "p.safetensors", "torch": "p.pt"}.get(form, "prompts.p")
    if form == "npy":
        np.save(file, array)
    elif form == "safetensors":
        save_file({"prompts": torch.from_numpy(array)}, file)
    elif form == "torch":
        torch.save(torch.from_numpy(array), file)
    else:
        kept = array.astype(np.float16) if form == "published half" else array
        file.write_bytes(pickle.dumps(kept, protocol=2 if form == "old protocol" else 5))
    loaded = load_prompts(file)
    assert loaded.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(loaded, axis=1), 1.0, atol=1e-6)
    np.testing.assert_allclose(loaded, array / np.linalg.norm(array, axis=1, keepdims=True), atol=1e-3)


def test_an_array_pickled_by_an_older_numpy_is_read(tmp_path: Path) -> None:
    array = np.load(tiny_q16_prompts())
    old = pickle.dumps(array, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert b"numpy.core.multiarray" in old
    (tmp_path / "prompts.p").write_bytes(old)
    assert np.array_equal(load_prompts(tmp_path / "prompts.p"), load_prompts(tiny_q16_prompts()))


def test_a_prompts_file_that_would_run_code_is_refused_unread(tmp_path: Path) -> None:
    class Surprise:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "prompts.p").write_bytes(pickle.dumps(Surprise()))
    with pytest.raises(ConfigError, match=r"reward\.q16_prompts: .*prompts\.p' .*which is no array\): give an \.npy"):
        load_prompts(tmp_path / "prompts.p")
    torch.save(Surprise(), tmp_path / "prompts.pt")
    with pytest.raises(ConfigError, match=r"reward\.q16_prompts: .*prompts\.pt'"):
        load_prompts(tmp_path / "prompts.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((3, 32)), r"its array is \[3, 32\]: two finite prompts \[2, d\] are needed"),
        (np.ones(32), r"its array is \[32\]"),
        (np.array([[1.0, np.nan], [1.0, 1.0]]), "two finite prompts"),
        (np.array([[0.0, 0.0], [1.0, 1.0]]), "two finite prompts"),
    ],
)
@pytest.mark.parametrize("act", [build_reward, check_rewards], ids=["build", "check"])
def test_prompts_that_are_none_are_named_never_nan(act: Any, tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "p.npy", array)
    with pytest.raises(ConfigError, match=rf"reward\.q16_prompts: .*p\.npy' .*{message}"):
        act(q16(tmp_path / "p.npy"))


@pytest.mark.parametrize("content", [b"", b"text", b"\x93NUMPY"])
@pytest.mark.parametrize("name", ["p.npy", "p.p", "p.safetensors", "p.pt"])
def test_a_torn_prompts_file_is_named(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"reward\.q16_prompts: .*{name}' .*holds no array of prompts") as caught:
        load_prompts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_prompts_of_another_model_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", unit(2, d=48))
    with pytest.raises(
        ConfigError, match=r"reward\.q16_prompts: .*48 dimensions and .* has 32: give both of one model"
    ):
        build_reward(q16(tmp_path / "p.npy"))


# ---- NudeNet -----------------------------------------------------------------------------------------------


def found(label: str, score: float) -> dict[str, Any]:
    return {"class": label, "score": score, "box": [0, 0, 9, 9]}


def test_nudity_is_the_highest_score_of_the_chosen_classes() -> None:
    detections = [
        found("FACE_FEMALE", 0.99),
        found("BUTTOCKS_EXPOSED", 0.4),
        found("FEMALE_BREAST_EXPOSED", 0.73),
        found("FEMALE_BREAST_EXPOSED", 0.55),
        found("FEET_EXPOSED", 0.95),
    ]
    assert nudity(detections, NudeNetConfig()) == 0.73
    assert nudity(detections, NudeNetConfig(classes=("BUTTOCKS_EXPOSED",))) == 0.4
    assert nudity(detections, NudeNetConfig(classes=("FEET_EXPOSED", "BUTTOCKS_EXPOSED"))) == 0.95


def test_nothing_detected_and_nothing_above_the_threshold_cost_nothing() -> None:
    assert nudity([], NudeNetConfig()) == 0.0
    assert nudity([found("FACE_MALE", 0.9)], NudeNetConfig()) == 0.0
    breast = [found("FEMALE_BREAST_EXPOSED", 0.6)]
    assert nudity(breast, NudeNetConfig(threshold=0.6)) == 0.6
    assert nudity(breast, NudeNetConfig(threshold=0.61)) == 0.0


def test_covered_parts_and_faces_are_not_nudity_by_default() -> None:
    counted = {label for label in LABELS if nudity([found(label, 0.9)], NudeNetConfig())}
    assert len(LABELS) == 18
    assert counted == set(NudeNetConfig().classes)
    assert all(label.endswith("_EXPOSED") for label in counted)


@pytest.mark.parametrize("act", [build_reward, check_rewards], ids=["build", "check"])
def test_without_the_package_the_command_that_installs_it_is_named(act: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nudenet", None)  # as good as not installed, for importing and for looking
    with pytest.raises(ConfigError, match=r'reward\.name: \'nudenet\' .*not installed: pip install "nudenet>=3\.4,<4"'):
        act(RewardConfig(name="nudenet", weight=-1.0))
    term = {"name": "nudenet", "weight": -0.5}
    with pytest.raises(ConfigError, match=r"reward\.terms\.0\.name: 'nudenet' .*not installed") as caught:
        act(RewardConfig.model_validate({"clip": CLIP, "terms": [term]}))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(find_spec("nudenet") is None, reason="needs the extra: make test EXTRAS=dev,nudenet")
def test_nudenet_gives_costs_of_real_images() -> None:
    scores = build_reward(RewardConfig(name="nudenet", weight=-1.0)).score(images(2, size=128), PROMPTS[:2])
    assert np.array_equal(scores.total, -scores.parts["nudenet"])
    assert ((scores.parts["nudenet"] >= 0.0) & (scores.parts["nudenet"] <= 1.0)).all()
