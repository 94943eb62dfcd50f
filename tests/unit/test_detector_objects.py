"""The detector of objects: transformers' own Mask2Former and open_clip, tiny and random, held to what their own code
says.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from evaluation.detectors.object_colours import COLOURS, MOST, TEMPLATES, ColourClassifier, cut_out, names_colour
from evaluation.detectors.objects import (
    CLASSES,
    ObjectsDetector,
    ObjectsDetectorConfig,
    _hub,
    box,
    check,
    class_name,
    instances,
    scaled,
)
from raysteer.errors import ConfigError
from rewards.config import ClipConfig
from tests.tiny_detectors import LABELS, tiny_mask2former
from tests.tiny_rewards import FOLDER, images

CLIP = ClipConfig(model=FOLDER, batch_size=4)
PLAIN, COLOURED = "a photo of a car", "a photo of a red car"


@pytest.fixture(scope="module")
def model() -> Path:
    return tiny_mask2former()


def config(model: Path, **own: Any) -> ObjectsDetectorConfig:
    return ObjectsDetectorConfig(
        model=str(model), shortest_edge=64, longest_edge=106, **{"batch_size": 2, "clip": CLIP, **own}
    )


@pytest.fixture(scope="module")
def detector(model: Path) -> ObjectsDetector:
    return ObjectsDetector(config(model))


@pytest.fixture
def copied(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copied"))


# ---- what it sees ---------------------------------------------------------------------------------------------------


def test_a_verdict_has_objects_of_cocos_classes_within_the_image_the_surest_first(detector: ObjectsDetector) -> None:
    verdicts = detector.detect(images(3), [PLAIN] * 3, None)
    assert len(verdicts) == 3 and all(verdicts)
    for found in verdicts:
        assert all(seen["class"] in CLASSES and seen["score"] > 0.05 for seen in found)
        assert [seen["score"] for seen in found] == sorted((seen["score"] for seen in found), reverse=True)
        for x0, y0, x1, y1 in (seen["box"] for seen in found):
            assert 0 <= x0 < x1 <= 32 and 0 <= y0 < y1 <= 32
    assert json.loads(json.dumps(verdicts)) == verdicts


def test_what_it_sees_does_not_depend_on_the_other_images(detector: ObjectsDetector) -> None:
    pictures, prompts = images(5), [PLAIN, COLOURED, PLAIN, COLOURED, PLAIN]
    alone = [detector.detect(pictures[i : i + 1], prompts[i : i + 1], None)[0] for i in range(5)]
    assert detector.detect(pictures, prompts, None) == alone
    assert detector.detect(pictures[:0], [], None) == []


def test_instances_are_those_of_transformers_own_processor(model: Path) -> None:
    """At 384x384, the one resolution that it has. It rounds scores, and knows no floor."""
    from transformers import AutoImageProcessor

    rng = torch.Generator().manual_seed(3)
    classes = 4 * torch.randn(1, 12, 81, generator=rng)
    masks = torch.randn(1, 12, 24, 24, generator=rng)
    processor = AutoImageProcessor.from_pretrained(model, local_files_only=True)
    theirs = processor.post_process_instance_segmentation(
        SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks),
        threshold=0.05,
        return_binary_maps=True,
    )[0]
    order = sorted(range(len(theirs["segments_info"])), key=lambda at: -theirs["segments_info"][at]["score"])
    scores, labels, found = instances(classes[0], masks[0], ((384, 384),) * 3, 0.05)
    assert len(scores) == len(order) > 3
    np.testing.assert_allclose(scores, [theirs["segments_info"][at]["score"] for at in order], atol=1e-5)
    assert labels.tolist() == [theirs["segments_info"][at]["label_id"] for at in order]
    assert np.array_equal(found, theirs["segmentation"].numpy()[order].astype(bool))


def test_nothing_above_the_floor_is_nothing_at_all() -> None:
    scores, labels, masks = instances(torch.zeros(3, 81), torch.ones(3, 8, 8), ((32, 32),) * 3, 0.05)
    assert len(scores) == len(labels) == 0 and masks.shape == (0, 32, 32)


def test_an_empty_mask_is_no_object_however_sure_its_class() -> None:
    classes = torch.full((2, 81), -9.0)
    classes[:, 5] = 9.0
    logits = torch.stack([torch.full((8, 8), -1.0), torch.full((8, 8), 4.0)])
    scores, labels, masks = instances(classes, logits, ((32, 32),) * 3, 0.05)
    assert labels.tolist() == [5] and masks.all() and scores[0] == pytest.approx(1 / (1 + np.exp(-4.0)), abs=1e-4)


def test_a_score_is_the_classs_probability_times_the_masks_mean_inside_itself() -> None:
    classes = torch.full((1, 81), -30.0)
    classes[0, 2] = classes[0, 80] = 1.0  # one half each of class 2 and of nothing
    logits = torch.full((1, 4, 4), -5.0)
    logits[0, :, :2] = 2.0
    scores, labels, _ = instances(classes, logits, ((4, 4),) * 3, 0.05)
    assert labels.tolist() == [2] and scores[0] == pytest.approx(0.5 / (1 + np.exp(-2.0)), abs=1e-5)


def test_what_was_filled_up_is_cut_off_the_masks() -> None:
    classes = torch.full((1, 81), -30.0)
    classes[0, 0] = 30.0
    logits = torch.full((1, 8, 8), -5.0)
    logits[0, :, 6:] = 5.0  # the last quarter, of which the image is the first half
    _, _, masks = instances(classes, logits, ((64, 64), (64, 56), (32, 28)), 0.05)
    assert box(masks[0]) == [24, 0, 28, 32]


def test_images_reach_the_model_as_transformers_own_processor_would_enlarge_them(
    model: Path, detector: ObjectsDetector
) -> None:
    from transformers import AutoImageProcessor

    pixels: list[torch.Tensor] = []
    hook = detector.model.register_forward_pre_hook(
        lambda _, args, given: pixels.append(given["pixel_values"]), with_kwargs=True
    )
    pictures = images(2)
    try:
        detector.detect(pictures, [PLAIN] * 2, None)
        detector.detect(images(1, 48)[:, :32], [PLAIN], None)
    finally:
        hook.remove()
    processor = AutoImageProcessor.from_pretrained(model, local_files_only=True)
    edges = {"shortest_edge": 64, "longest_edge": 106}
    theirs = processor([Image.fromarray(picture) for picture in pictures], size=edges, return_tensors="pt")
    np.testing.assert_allclose(pixels[0], theirs["pixel_values"], atol=0.03)  # one step of 255
    assert pixels[1].shape == (2, 3, 64, 96)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((512, 512), (800, 800)), ((512, 768), (800, 1200)), ((1024, 256), (1333, 333)), ((1024, 1024), (800, 800))],
)
def test_an_image_is_enlarged_to_800_pixels_unless_its_other_edge_would_exceed_1333(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert scaled(size[0], size[1], 800, 1333) == expected


def test_a_box_ends_behind_its_last_pixel() -> None:
    mask = np.zeros((6, 8), bool)
    mask[2, 3] = mask[4, 5] = True
    assert box(mask) == [3, 2, 6, 5]


def test_there_are_80_classes_and_other_names_of_them_are_known() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 80 and CLASSES[0] == "person" and CLASSES[-1] == "toothbrush"
    assert [class_name(label) for label in LABELS] == list(CLASSES)
    assert class_name("Hot_Dog") == "hot dog" and class_name("wall-brick") is None


# ---- colours --------------------------------------------------------------------------------------------------------


def test_colours_are_told_only_where_the_prompt_names_one(detector: ObjectsDetector) -> None:
    plain, coloured = detector.detect(images(1).repeat(2, 0), [PLAIN, COLOURED], None)
    assert {(seen["colour"], seen["colour_score"]) for seen in plain} == {(None, None)}
    assert all(seen["colour"] in COLOURS and 0.1 <= seen["colour_score"] <= 1.0 for seen in coloured)
    blind = [{**seen, "colour": None, "colour_score": None} for seen in coloured]
    assert blind == plain


def test_a_colour_is_named_as_a_word() -> None:
    assert names_colour("A Red car") and names_colour("an orange, please") and not names_colour("a bored blackbird")


def test_at_most_sixteen_of_a_class_get_a_colour(detector: ObjectsDetector) -> None:
    n = MOST + 3
    objects: list[dict[str, Any]] = [{"class": "car", "box": [0, 0, 4, 4], "colour": None} for _ in range(n)]
    objects.append({"class": "dog", "box": [0, 0, 4, 4], "colour": None})
    detector._tell_colours(images(1)[0], objects, [np.ones((32, 32), bool)] * (n + 1))
    assert [bool(seen["colour"]) for seen in objects] == [True] * MOST + [False] * 3 + [True]


def test_what_is_not_the_object_is_grey() -> None:
    picture = images(1)[0]
    mask = np.zeros((32, 32), bool)
    mask[4:8, 4:6] = True
    mask[20, 30] = True
    crop = cut_out(picture, [4, 4, 31, 21], mask, np.array([153, 153, 153], np.uint8))
    assert crop.shape == (17, 27, 3) and crop.dtype == np.uint8
    assert np.array_equal(crop[:4, :2], picture[4:8, 4:6]) and np.array_equal(crop[16, 26], picture[20, 30])
    assert (crop[4:16] == 153).all() and (crop[:4, 2:] == 153).all()


def test_a_colour_is_what_open_clips_own_code_makes_of_the_three_sentences() -> None:
    import open_clip

    picture, mask = images(1, 64)[0], np.ones((64, 64), bool)
    boxes = [(0, 0, 64, 64), (3, 5, 43, 25), (10, 0, 17, 60)]
    ours = ColourClassifier("objects.clip", CLIP, "#999999", "cpu").classify(
        picture, [("dog", own, mask) for own in boxes]
    )
    clip, _, transform = open_clip.create_model_and_transforms(FOLDER)
    tokens = open_clip.get_tokenizer(FOLDER)
    with torch.no_grad():
        weights = []
        for colour in COLOURS:
            z = clip.eval().encode_text(tokens([text.format(colour=colour, name="dog") for text in TEMPLATES]))
            mean = torch.nn.functional.normalize(z, dim=-1).mean(0)
            weights.append(mean / mean.norm())
        crops = torch.stack([transform(Image.fromarray(picture).crop(own)) for own in boxes])
        z = torch.nn.functional.normalize(clip.encode_image(crops), dim=-1)
        theirs = (100 * z @ torch.stack(weights).T).softmax(-1)
    for (_, probability), row in zip(ours, theirs, strict=True):
        assert probability == pytest.approx(row.max().item(), abs=0.05)  # PIL resizes a little differently
    assert ours[0][0] == COLOURS[int(theirs[0].argmax())]


# ---- identity and bad input -----------------------------------------------------------------------------------------


def test_the_identity_is_of_weights_and_settings_and_not_of_a_path(detector: ObjectsDetector, copied: Path) -> None:
    same = ObjectsDetector(config(copied, batch_size=3)).identity()
    assert same == detector.identity() and str(copied) not in json.dumps(same)
    assert ObjectsDetector(config(copied, floor=0.1)).identity() != same
    assert ObjectsDetector(config(copied, background="#000000")).identity() != same
    from transformers import Mask2FormerForUniversalSegmentation

    model = Mask2FormerForUniversalSegmentation.from_pretrained(copied)
    model.class_predictor.bias.data += 1.0
    model.save_pretrained(copied)
    assert ObjectsDetector(config(copied)).identity()["weights_sha256"] != same["weights_sha256"]


def refused(own: ObjectsDetectorConfig, key: str = "model") -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check(own)
    assert caught.value.key == f"evaluation.detectors.objects.{key}"
    return caught.value


def test_a_model_that_is_whole_is_accepted(model: Path) -> None:
    check(config(model))


def test_a_hub_model_is_known_by_its_commit(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "models--lab--mask2former"
    shutil.copytree(model, repository / "snapshots" / "0123abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    check(config(Path("lab/mask2former")))
    assert _hub(config(Path("lab/mask2former"))) == {"model": "lab/mask2former", "revision": "0123abc"}
    assert _hub(config(model)) == {}


def test_a_model_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in refused(config(tmp_path / "nowhere")).remedy
    assert "hf download lab/nowhere" in refused(config(Path("lab/nowhere"))).remedy
    assert "config.json" in refused(config(tmp_path)).remedy


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_folder_without_one_of_its_files_is_refused(copied: Path, name: str) -> None:
    (copied / name).unlink()
    assert name in refused(config(copied)).remedy


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "detr"}, "no Mask2Former"),
        ({"id2label": {"0": "cat", "1": "remote"}}, "78 of COCO's 80 classes"),
        ({"id2label": None}, "80 of COCO's 80 classes"),
    ],
)
def test_a_model_of_another_kind_or_of_other_classes_is_refused(
    copied: Path, change: dict[str, Any], named: str
) -> None:
    described = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**described, **change}))
    assert named in refused(config(copied)).remedy


def test_files_that_are_no_json_are_refused(copied: Path) -> None:
    (copied / "preprocessor_config.json").write_text("{")
    assert "not valid JSON" in refused(config(copied)).remedy
    (copied / "preprocessor_config.json").write_text("{}")
    assert "image_mean" in refused(config(copied)).remedy


def test_weights_that_are_torn_or_not_whole_are_refused_when_loaded(copied: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = copied / "model.safetensors"
    state = load_file(file)
    save_file({k: v for k, v in state.items() if not k.startswith("class_predictor")}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"class_predictor\.\w+ is missing"):
        ObjectsDetector(config(copied))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        ObjectsDetector(config(copied))


def test_a_clip_model_that_is_not_there_is_refused_by_its_key_here(model: Path, tmp_path: Path) -> None:
    clip = ClipConfig(model=f"local-dir:{tmp_path / 'nowhere'}")
    assert "no such folder" in refused(config(model, clip=clip), "clip.model").remedy


@pytest.mark.parametrize(
    "own", [{"floor": 0.2}, {"floor": 0.0}, {"background": "grey"}, {"shortest_edge": 900, "longest_edge": 800}]
)
def test_settings_that_cannot_be_are_refused(own: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ObjectsDetectorConfig(**own)


def test_reading_a_recipe_with_the_suite_and_the_detector_imports_no_torch() -> None:
    code = "import sys, evaluation.suites.geneval, evaluation.detectors.objects; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
