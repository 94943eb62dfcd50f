"""CLIP as a detector: cosines that depend on nothing but the image, its prompt and the base model's image."""

import json

import numpy as np
import pytest

from evaluation.detectors.clip import ClipDetector, check
from raysteer.errors import ConfigError
from rewards.clip import ClipScorer
from rewards.config import ClipConfig
from tests.tiny_rewards import FOLDER, PROMPTS, images, named_clip

CONFIG = ClipConfig(model=FOLDER, batch_size=3)


def test_it_gives_the_cosines_of_image_and_prompt_and_of_image_and_base_image() -> None:
    pictures, base = images(4), images(4, seed=1)
    scorer = ClipScorer(CONFIG)
    z, other = scorer.encode_images(pictures), scorer.encode_images(base)
    seen = ClipDetector(CONFIG).detect(pictures, PROMPTS, base)
    text = (z * scorer.encode_texts(PROMPTS)).sum(1)
    np.testing.assert_allclose([verdict["text"] for verdict in seen], text, atol=1e-6)
    np.testing.assert_allclose([verdict["base"] for verdict in seen], (z * other).sum(1), atol=1e-6)
    assert json.loads(json.dumps(seen)) == seen


def test_the_base_model_is_wholly_like_itself() -> None:
    detector, pictures = ClipDetector(CONFIG), images(4)
    assert [verdict["base"] for verdict in detector.detect(pictures, PROMPTS, None)] == [1.0] * 4
    assert detector.detect(pictures, PROMPTS, pictures) == detector.detect(pictures, PROMPTS, None)


def test_a_verdict_does_not_depend_on_the_images_beside_it() -> None:
    detector, pictures, base = ClipDetector(CONFIG), images(4), images(4, seed=1)
    together = detector.detect(pictures, PROMPTS, base)
    alone = [detector.detect(pictures[i : i + 1], PROMPTS[i : i + 1], base[i : i + 1])[0] for i in range(4)]
    assert together == alone


def test_the_same_weights_are_the_same_detector_from_a_folder_and_by_name() -> None:
    by_folder, by_name = ClipDetector(CONFIG).identity(), ClipDetector(named_clip()).identity()
    assert by_folder["weights_sha256"] == by_name["weights_sha256"]
    assert by_folder["name"] == "clip" and json.loads(json.dumps(by_folder)) == by_folder
    assert "/" not in json.dumps(by_folder), "a path of one machine would make it another detector on the next"


def test_other_precision_is_another_detector() -> None:
    half = ClipDetector(ClipConfig(model=FOLDER, precision="bf16"))
    assert half.identity() != ClipDetector(CONFIG).identity()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"^evaluation\.detectors\.clip: missing or null; .*add model: "),
        (ClipConfig(model="local-dir:/nowhere"), r"^evaluation\.detectors\.clip\.model: 'local-dir:/nowhere'"),
        (ClipConfig(model="ViT-B-32", pretrained="/no.pt"), r"^evaluation\.detectors\.clip\.pretrained: '/no\.pt'"),
    ],
)
def test_a_model_that_cannot_work_is_refused_under_the_detectors_own_key(
    config: ClipConfig | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check(config)
    if config is not None:
        with pytest.raises(ConfigError, match=message):
            ClipDetector(config)
