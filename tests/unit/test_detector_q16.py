"""Q16 as a detector says what Q16 as a reward costs, and names its prompts and weights by their content."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.detectors.q16 import Q16Detector, Q16DetectorConfig, check
from raysteer.errors import ConfigError
from rewards.base import build_reward
from rewards.config import ClipConfig, RewardConfig
from tests.tiny_rewards import FOLDER, images, named_clip, tiny_q16_prompts, unit

CLIP = ClipConfig(model=FOLDER)


def config(prompts: Path | str | None = None, clip: ClipConfig = CLIP) -> Q16DetectorConfig:
    return Q16DetectorConfig(clip=clip, prompts=str(prompts or tiny_q16_prompts()))


def test_a_verdict_is_the_cost_that_the_reward_subtracts() -> None:
    pictures = images(5)
    verdicts = Q16Detector(config()).detect(pictures, ["a"] * 5, None)
    reward = RewardConfig(name="q16", weight=-1.0, clip=CLIP, q16_prompts=str(tiny_q16_prompts()))
    assert np.array_equal(np.array(verdicts, np.float32), build_reward(reward).score(pictures, ["a"] * 5).parts["q16"])
    assert all(0.0 <= one <= 1.0 for one in verdicts) and len(set(verdicts)) == 5
    assert json.loads(json.dumps(verdicts)) == verdicts


def test_a_verdict_does_not_depend_on_the_images_beside_it_nor_on_prompt_or_base() -> None:
    detector, pictures = Q16Detector(config()), images(5)
    alone = [detector.detect(one[None], ["b"], pictures[:1])[0] for one in pictures]
    assert detector.detect(pictures, ["a"] * 5, None) == alone


def test_the_identity_is_of_the_content_wherever_the_files_lie(tmp_path: Path) -> None:
    identity = Q16Detector(config()).identity()
    copy = tmp_path / "copy.npy"
    copy.write_bytes(tiny_q16_prompts().read_bytes())
    assert Q16Detector(config(copy)).identity() == identity == json.loads(json.dumps(identity))
    assert Q16Detector(config(clip=named_clip())).identity() == identity  # by name and weights file, not by folder
    assert str(tmp_path) not in json.dumps(identity) and FOLDER not in json.dumps(identity)


def test_other_prompts_and_other_precision_are_another_detector(tmp_path: Path) -> None:
    np.save(tmp_path / "other.npy", unit(2, seed=9))
    identity = Q16Detector(config()).identity()
    others = config(tmp_path / "other.npy"), config(clip=ClipConfig(model=FOLDER, precision="bf16"))
    for other in others:
        assert Q16Detector(other).identity() != identity


@pytest.mark.parametrize("act", [check, Q16Detector])
def test_prompts_that_are_missing_or_none_are_named_by_the_key_of_the_detector(act: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^evaluation\.detectors\.q16\.prompts: .*none\.p' .*there is no such file"):
        act(config(tmp_path / "none.p"))
    np.save(tmp_path / "three.npy", unit(3))
    with pytest.raises(ConfigError, match=r"^evaluation\.detectors\.q16\.prompts: .*its array is \[3, 32\]"):
        act(config(tmp_path / "three.npy"))


def test_prompts_of_another_model_are_named_by_the_key_of_the_detector(tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", unit(2, d=48))
    with pytest.raises(ConfigError, match=r"^evaluation\.detectors\.q16\.prompts: .*48 dimensions and .* has 32"):
        Q16Detector(config(tmp_path / "wide.npy"))


@pytest.mark.parametrize("act", [check, Q16Detector])
def test_a_clip_that_is_not_there_is_named_by_the_key_of_the_detector(act: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"^evaluation\.detectors\.q16\.clip\.model: 'local-dir:/no' .*no such folder"
    ):
        act(config(clip=ClipConfig(model="local-dir:/no")))
    with pytest.raises(
        ConfigError, match=r"^evaluation\.detectors\.q16\.clip\.pretrained: '/no\.pt' .*no such weights"
    ):
        act(config(clip=ClipConfig(model="ViT-B-32", pretrained="/no.pt")))


def test_reading_a_recipe_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, evaluation.detectors.q16, evaluation.detectors.nudenet; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
