"""Inception features and the file of a reference set, with the real network and random weights."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.detectors.inception import (
    InceptionConfig,
    InceptionDetector,
    check,
    check_reference,
    decode,
    encode,
    extractor_id,
    main,
    read_reference,
    write_reference,
)
from raysteer.errors import ConfigError, UserError
from tests.tiny_detectors import random_inception
from tests.tiny_rewards import images

KEY = "evaluation.coco.reference"
needs_package = pytest.mark.skipif(find_spec("torch_fidelity") is None, reason="needs the extra fid")


@pytest.fixture(scope="module")
def weights() -> str:
    if find_spec("torch_fidelity") is None:
        pytest.skip("needs the extra fid")
    return str(random_inception())


@pytest.fixture(scope="module")
def detector(weights: str) -> InceptionDetector:
    return InceptionDetector(InceptionConfig(weights=weights, batch_size=2))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of three sizes and kinds, one in a folder of its own."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "more").mkdir()
    Image.fromarray(images(1, 48)[0]).save(folder / "b.png")
    Image.fromarray(images(1, 40, seed=1)[0][:, :24]).convert("L").save(folder / "a.JPG")
    Image.fromarray(images(1, 32, seed=2)[0]).save(folder / "more" / "c.webp", lossless=True)
    (folder / "captions.txt").write_text("no image\n")
    return folder


@pytest.fixture(scope="module")
def reference(photographs: Path, weights: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "reference.npz"
    assert write_reference(photographs, out, InceptionConfig(weights=weights, batch_size=2)) == 3
    return out


# ---- features -------------------------------------------------------------------------------------------------------


def test_features_are_those_of_the_network_itself(weights: str) -> None:
    detector = InceptionDetector(InceptionConfig(weights=weights, resize="tensorflow", batch_size=2))
    pictures = images(2, 40)
    expected = detector.network(torch.from_numpy(pictures).permute(0, 3, 1, 2))[0].numpy()
    np.testing.assert_allclose(detector.features(pictures), expected, rtol=1e-5, atol=1e-6)
    assert expected.shape == (2, 2048) and expected.std() > 1e-3


def test_a_verdict_is_json_and_holds_every_bit(detector: InceptionDetector) -> None:
    pictures = images(2, 40)
    seen = detector.detect(pictures, ["a", "b"], None)
    assert json.loads(json.dumps(seen)) == seen
    assert np.array_equal(np.stack([decode(verdict["features"]) for verdict in seen]), detector.features(pictures))
    row = np.array([1 / 3, -0.0, 1e-40], np.float32)
    assert decode(encode(row)).tobytes() == row.tobytes()


def test_features_do_not_depend_on_the_images_beside_it(detector: InceptionDetector) -> None:
    pictures = images(3, 40)
    together = detector.features(pictures)
    assert np.array_equal(together[2], detector.features(pictures[2:])[0])
    assert np.array_equal(together[1], detector.features(pictures[1:])[0])


def test_clean_resizing_is_pils_bicubic_in_float_and_stays_in_range(detector: InceptionDetector) -> None:
    picture = images(1, 600)[0]
    small = detector._resize(picture).numpy()
    assert small.shape == (3, 299, 299) and small.min() >= 0.0 and small.max() <= 255.0
    in_bytes = np.asarray(Image.fromarray(picture).resize((299, 299), Image.Resampling.BICUBIC), np.float32)
    difference = np.abs(small.transpose(1, 2, 0) - in_bytes)
    assert 0.1 < difference.mean() < 0.5, "the same, but for the rounding to whole numbers"


def test_the_two_resizings_see_other_features(weights: str, detector: InceptionDetector) -> None:
    other = InceptionDetector(InceptionConfig(weights=weights, resize="tensorflow", batch_size=2))
    picture = images(1, 600)
    assert np.abs(detector.features(picture) - other.features(picture)).max() > 1e-3
    assert extractor_id(detector.extractor) != extractor_id(other.extractor)
    identity = detector.identity()
    assert identity["resize"] == "clean" and len(identity["weights_sha256"]) == 64


# ---- what is refused before anything is drawn ------------------------------------------------------------------------


def test_without_a_section_or_the_file_the_remedy_names_the_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^evaluation\.detectors\.inception\.weights: missing.*6726825d\.pth"):
        check(None)
    if find_spec("torch_fidelity") is not None:
        with pytest.raises(ConfigError, match=r"\.weights: '.*no\.pth'.*no such file.*6726825d\.pth"):
            check(InceptionConfig(weights=str(tmp_path / "no.pth")))


def test_without_the_package_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ConfigError, match=r'inception: .*not installed: pip install "torch-fidelity>=0\.4,<0\.5"'):
        check(InceptionConfig(weights="any.pth"))


@needs_package
@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"fc.weight": torch.zeros(1000, 2048)}, r"another network than FID's \(fc\.weight is \[1000, 2048\]"),
        ({"a": torch.zeros(1)}, r"another network than FID's \(fc\.weight is missing"),
    ],
    ids=["torchvision's", "none"],
)
def test_weights_of_another_network_are_refused_by_the_check(tmp_path: Path, state: Any, message: str) -> None:
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=message):
        check(InceptionConfig(weights=str(tmp_path / "w.pth")))


@needs_package
def test_weights_with_a_layer_missing_are_refused_in_one_line(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"\.weights: .*another network's .*Missing key") as caught:
        InceptionDetector(InceptionConfig(weights=str(tmp_path / "w.pth")))
    assert "\n" not in str(caught.value)


class _Runs:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


@needs_package
def test_nothing_in_a_weights_file_is_ever_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": _Runs()}, "w.pth")
    with pytest.raises(ConfigError, match="a file of tensors alone"):
        InceptionDetector(InceptionConfig(weights="w.pth"))
    assert not Path("ran").exists()


# ---- the reference --------------------------------------------------------------------------------------------------


def test_the_reference_holds_features_of_all_images_in_the_order_of_their_paths(
    reference: Path, photographs: Path, detector: InceptionDetector
) -> None:
    found = read_reference(str(reference), KEY)
    order = [photographs / "a.JPG", photographs / "b.png", photographs / "more" / "c.webp"]
    pictures = [np.asarray(Image.open(file).convert("RGB")) for file in order]
    assert found.features is not None
    assert np.array_equal(found.features, detector.features(pictures))
    np.testing.assert_allclose(found.mean, found.features.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found.covariance, np.cov(found.features, rowvar=False), atol=1e-6)
    assert found.extractor == detector.extractor
    assert [file.name for file in reference.parent.iterdir()] == ["reference.npz"], "nothing else is left behind"


def test_a_reference_of_another_resizing_is_refused_and_says_what_differs(reference: Path, weights: str) -> None:
    check_reference(InceptionConfig(weights=weights, batch_size=9), str(reference), KEY)
    with pytest.raises(ConfigError, match=r"^evaluation\.coco\.reference: .*resize clean, not tensorflow"):
        check_reference(InceptionConfig(weights=weights, resize="tensorflow"), str(reference), KEY)


def test_an_image_that_cannot_be_read_leaves_no_file(tmp_path: Path, weights: str) -> None:
    folder = tmp_path / "real"
    folder.mkdir()
    Image.fromarray(images(1)[0]).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"half a picture")
    with pytest.raises(UserError, match=r"b\.png: is no readable image"):
        write_reference(folder, tmp_path / "out.npz", InceptionConfig(weights=weights, batch_size=2))
    assert [file.name for file in tmp_path.iterdir()] == ["real"]


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path / "out.npz"), "--weights", "w.pth"]) == 2
    assert capsys.readouterr().err.startswith(f"{tmp_path}: it holds 0 images; give a folder of two real images")


def statistics(file: Path, **arrays: np.ndarray) -> str:
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return str(file)


def test_files_of_pytorch_fid_and_clean_fid_are_read(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((8, 3))
    alone = read_reference(statistics(tmp_path / "a.npz", mu=rows.mean(0), sigma=np.cov(rows, rowvar=False)), KEY)
    assert alone.features is None and alone.extractor is None
    features = read_reference(statistics(tmp_path / "b.npz", feats=rows), KEY)
    np.testing.assert_allclose(features.covariance, alone.covariance)
    assert alone.sha256 != features.sha256


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"other": np.zeros(3)}, "neither features nor mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, r"do not fit each other \(mu is \[3\] and sigma \[2, 2\]\)"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "not finite"),
        ({"features": np.zeros((1, 2))}, r"its features are \[1, 2\]"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "extractor": np.array("[1]")}, "it is no .npz file of features"),
    ],
)
def test_a_file_that_is_no_reference_is_refused_with_the_command(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^evaluation\.coco\.reference: .*{message}"):
        read_reference(statistics(tmp_path / "r.npz", **arrays), KEY)


def test_a_folder_a_missing_and_a_torn_file_are_refused_with_the_command(tmp_path: Path) -> None:
    statistics(tmp_path / "whole.npz", feats=np.random.default_rng(0).standard_normal((8, 300)))
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "torn.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("fid: 12")
    np.save(tmp_path / "one.npy", np.zeros(3))
    command = r"python -m evaluation\.detectors\.inception IMAGES reference\.npz --weights"
    for name, problem in (
        ("", "it is a folder"),
        ("no.npz", "there is no such file"),
        ("torn.npz", "it is no .npz file"),
        ("text.npz", "it is no .npz file"),
        ("one.npy", "it is no .npz file"),
    ):
        with pytest.raises(ConfigError, match=rf"{problem}.*{command}"):
            read_reference(str(tmp_path / name), KEY)
