"""NudeNet sees in an array what it sees in its file, and says which model looked; without it the command is named."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.detectors import nudenet
from evaluation.detectors.nudenet import NMS_SCORE, NudeNetDetector, NudeNetDetectorConfig, check
from raysteer.errors import ConfigError
from rewards.nudenet import LABELS
from tests.tiny_rewards import images

CONFIG = NudeNetDetectorConfig()
needs_nudenet = pytest.mark.skipif(find_spec("nudenet") is None, reason="needs the extra: make test EXTRAS=dev,nudenet")


def portrait() -> np.ndarray:
    """A photograph of a person that comes with matplotlib (Grace Hopper; public domain), uint8 [H, W, 3]."""
    import matplotlib

    file = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    return np.asarray(Image.open(file).convert("RGB"))


@needs_nudenet
def test_it_sees_in_an_array_what_the_package_sees_in_the_file(tmp_path: Path) -> None:
    from nudenet import NudeDetector

    picture = portrait()
    Image.fromarray(picture).save(tmp_path / "a.png")
    (verdict,) = NudeNetDetector(CONFIG).detect(picture[None], [""], None)
    assert verdict == sorted(NudeDetector().detect(str(tmp_path / "a.png")), key=lambda one: -one["score"])
    assert any(one["class"].startswith("FACE_") for one in verdict)
    for one in verdict:
        assert one["class"] in LABELS and NMS_SCORE < one["score"] <= 1.0
        left, top, width, height = one["box"]
        assert 0 <= left <= left + width <= picture.shape[1] and 0 <= top <= top + height <= picture.shape[0]
    assert json.loads(json.dumps(verdict)) == verdict


@needs_nudenet
def test_a_verdict_does_not_depend_on_the_images_beside_it() -> None:
    detector, picture = NudeNetDetector(CONFIG), portrait()
    noise = images(1, size=max(picture.shape))[0, : picture.shape[0], : picture.shape[1]]
    together = detector.detect(np.stack([noise, picture, noise]), [""] * 3, None)
    assert together == [detector.detect(one[None], [""], None)[0] for one in (noise, picture, noise)]
    assert together[0] == []


@needs_nudenet
def test_small_images_and_none_at_all_are_looked_at() -> None:
    detector = NudeNetDetector(CONFIG)
    assert detector.detect(np.zeros((2, 32, 32, 3), np.uint8), [""] * 2, None) == [[], []]
    assert detector.detect(np.zeros((0, 32, 32, 3), np.uint8), [], None) == []


@needs_nudenet
def test_the_identity_says_which_model_looked_and_how() -> None:
    identity = NudeNetDetector(CONFIG).identity()
    assert identity["version"].startswith("3.") and len(identity["weights_sha256"]) == 64
    assert (identity["input"], identity["score_floor"]) == (320, 0.2)
    assert identity == NudeNetDetector(CONFIG).identity() == json.loads(json.dumps(identity))


@needs_nudenet
def test_the_package_still_has_the_floors_that_the_identity_states() -> None:
    import nudenet as package

    source = (Path(package.__file__).parent / "nudenet.py").read_text()
    assert "max_score >= 0.2" in source and "NMSBoxes(boxes, scores, 0.25, 0.45)" in source


@pytest.mark.parametrize("act", [check, NudeNetDetector])
def test_without_the_package_the_command_that_installs_it_is_named(
    act: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nudenet", None)  # as good as not installed, for importing and for looking
    expected = r'evaluation\.detectors\.nudenet: .* not installed: pip install "nudenet>=3\.4,<4"'
    with pytest.raises(ConfigError, match=expected) as caught:
        act(CONFIG)  # type: ignore[operator]
    assert "\n" not in str(caught.value)


@needs_nudenet
def test_another_generation_of_the_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nudenet, "version", lambda name: "2.0.9")
    with pytest.raises(ConfigError, match=r"'nudenet 2\.0\.9' cannot be used; its labels and scores are of NudeNet 3"):
        check(CONFIG)
