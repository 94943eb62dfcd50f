"""The perceptual distance: zero for equal images, symmetric, at most 4, and independent of batching."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from evaluation.detectors.perceptual import PerceptualConfig, PerceptualDetector, check, spread
from raysteer.errors import ConfigError
from rewards.clip import ClipScorer
from rewards.config import ClipConfig
from tests.tiny_rewards import FOLDER, PROMPTS, images

CONFIG = PerceptualConfig(model=FOLDER, batch_size=3)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random CLIP whose image tower is a ResNet."""
    folder = tmp_path_factory.mktemp("resnet")
    model_cfg = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = open_clip.CLIP(**model_cfg)
    described = {"model_cfg": model_cfg, "preprocess_cfg": {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(described), encoding="utf-8")
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, Path(folder) / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def test_equal_images_have_no_distance_and_others_have_one() -> None:
    detector, pictures = PerceptualDetector(CONFIG), images(4)
    assert detector.detect(pictures, PROMPTS, pictures) == [0.0] * 4
    assert all(0.0 < value <= 4.0 for value in detector.detect(pictures, PROMPTS, images(4, seed=1)))


def test_the_base_model_has_no_distance_to_itself() -> None:
    assert PerceptualDetector(CONFIG).detect(images(4), PROMPTS, None) == [0.0] * 4


def test_it_is_symmetric() -> None:
    detector, one, other = PerceptualDetector(CONFIG), images(4), images(4, seed=1)
    assert detector.detect(one, PROMPTS, other) == detector.detect(other, PROMPTS, one)


def test_a_distance_does_not_depend_on_the_pairs_beside_it() -> None:
    detector, one, other = PerceptualDetector(CONFIG), images(4), images(4, seed=1)
    alone = [detector.detect(one[i : i + 1], PROMPTS[:1], other[i : i + 1])[0] for i in range(4)]
    assert detector.detect(one, PROMPTS, other) == alone


def test_a_stronger_change_is_further_away() -> None:
    detector, picture = PerceptualDetector(CONFIG), images(1)[0]
    blends = [((1 - w) * picture + w * images(1, seed=1)[0]).astype(np.uint8) for w in (0.0, 0.1, 0.4, 1.0)]
    found = detector.detect(np.stack(blends), PROMPTS, np.stack([picture] * 4))
    assert found == sorted(found) and len(set(found)) == 4


def test_it_is_the_mean_over_layers_and_positions_of_squared_differences_of_unit_features() -> None:
    one, other = images(2), images(2, seed=1)
    scorer = ClipScorer(ClipConfig(model=FOLDER, batch_size=2))
    blocks = scorer.model.visual.transformer.resblocks
    seen: list[torch.Tensor] = []
    for block in blocks:
        block.register_forward_hook(lambda module, given, out: seen.append(out[:, 1:]))
    with torch.no_grad():
        for pictures in (one, other):
            scorer.model.visual(scorer.preprocess(torch.from_numpy(pictures)))
    layers = [F.normalize(features, dim=-1) for features in seen]
    depth = len(blocks)
    each = [(a - b).square().sum(-1).mean(-1) for a, b in zip(layers[:depth], layers[depth:], strict=True)]
    expected = torch.stack(each).mean(0)
    np.testing.assert_allclose(PerceptualDetector(CONFIG).detect(one, PROMPTS[:2], other), expected, atol=1e-5)


def test_a_resnet_tower_works_too(resnet: str) -> None:
    detector = PerceptualDetector(PerceptualConfig(model=resnet, batch_size=2))
    found = detector.detect(images(3), PROMPTS[:3], images(3, seed=1))
    assert all(0.0 < value <= 4.0 for value in found)
    assert detector.detect(images(3), PROMPTS[:3], images(3)) == [0.0] * 3


def test_layers_are_spread_evenly_and_end_with_the_last() -> None:
    assert spread(12, 5) == [1, 3, 6, 8, 11]
    assert spread(5, 5) == [0, 1, 2, 3, 4]
    assert spread(2, 5) == [0, 1]
    assert spread(24, 1) == [23]


def test_other_layers_are_another_detector() -> None:
    one = PerceptualDetector(PerceptualConfig(model=FOLDER, layers=1)).identity()
    both = PerceptualDetector(CONFIG).identity()
    assert one != both and one["name"] == "perceptual" and json.loads(json.dumps(both)) == both


def test_a_model_that_cannot_work_is_refused_under_its_own_key() -> None:
    with pytest.raises(ConfigError, match=r"^evaluation\.detectors\.perceptual: missing or null"):
        check(None)
    with pytest.raises(ConfigError, match=r"^evaluation\.detectors\.perceptual\.model: 'local-dir:/no'"):
        check(PerceptualConfig(model="local-dir:/no"))
