"""The glyph world says what it shows: captions, scenes, pixels and detector agree."""

import numpy as np
import pytest
from scipy import ndimage

from glyphs import detector, prompts
from glyphs.grammar import (
    BENIGN_TASKS,
    UNSAFE_FORMS,
    by_form,
    fulfil,
    parse,
    pretraining_pair,
    requests,
    stratified_prompts,
)
from glyphs.world import CATEGORIES, COLOURS, MARKS, RELATIONS, SHAPES, Item, Scene, place, render, shape_mask


def draw_requests(count, prompt_class=None, split="test", seed=0):
    rng = np.random.default_rng(seed)
    pool = [r for r in requests(split) if prompt_class in (None, r.prompt_class)]
    chosen = [pool[i] for i in rng.integers(0, len(pool), size=count)]
    scenes = [fulfil(r, rng) for r in chosen]
    return chosen, scenes, np.stack([render(s, rng) for s in scenes])


def test_held_out_captions_never_appear_in_training():
    train, test = ({r.text for r in requests(split)} for split in ("train", "test"))
    assert train and test and not train & test
    rng = np.random.default_rng(0)
    drawn = {pretraining_pair(rng)[0] for _ in range(5000)}
    assert not any(
        text.endswith(held) and text.split(held)[0] in ("", "a picture of ", "an image of ")
        for held in test
        for text in drawn
    )


def test_every_task_form_and_category_is_held_out_somewhere():
    assert set(by_form("test")) == {*BENIGN_TASKS, *UNSAFE_FORMS} == set(by_form("train"))
    assert {r.category for r in requests("test")} - {None} == set(CATEGORIES)


def test_detector_reads_renders_exactly():
    _, scenes, images = draw_requests(300)
    for scene, found in zip(scenes, detector.detect_all(images), strict=True):
        assert sorted((d.kind, d.colour) for d in found) == sorted((i.kind, i.colour or "black") for i in scene.items)


def test_detector_survives_blur_and_noise_without_false_alarms():
    asked, _, images = draw_requests(400, seed=1)
    rng = np.random.default_rng(2)
    blurred = ndimage.gaussian_filter(images.astype(float), (0, 0.5, 0.5, 0)) + rng.normal(0, 6, images.shape)
    flags = detector.inappropriate(np.clip(blurred, 0, 255).astype(np.uint8))
    unsafe = np.array([r.prompt_class == "unsafe" for r in asked])
    assert flags[unsafe].mean() > 0.99 and flags[~unsafe].sum() == 0


def test_half_erased_marks_still_count_as_inappropriate():
    rng = np.random.default_rng(0)
    for category in CATEGORIES:
        image = render(Scene((Item(category, None, 2, 2),)), rng)
        image[:, 14:] = 230  # the right half of the mark is gone
        assert detector.inappropriate(image[None])[0] == 1.0, category


def test_blank_images_are_blank_and_empty_requests_of_the_detector_are_safe():
    image = render(Scene(()), np.random.default_rng(0))
    assert detector.is_blank(detector.detect(image)) and detector.inappropriate(image[None])[0] == 0.0
    assert detector.inappropriate(np.empty((0, 32, 32, 3), np.uint8)).shape == (0,)


def test_templates_are_told_apart():
    for first in MARKS:
        for second in MARKS:
            if first != second:
                assert detector._best_overlap(MARKS[first], MARKS[second]) < 0.75, (first, second)
    for shape in SHAPES:
        assert detector._classify_shape(shape_mask(shape)) == (shape, 1.0)


def test_placed_boxes_never_overlap_and_keep_their_relation():
    rng = np.random.default_rng(0)
    for relation in RELATIONS:
        for _ in range(50):
            (ca, ra), (cb, rb) = place(2, rng, relation)
            assert max(abs(ca - cb), abs(ra - rb)) >= 3
            holds = {"left of": ca < cb, "right of": ca > cb, "above": ra < rb, "below": ra > rb}[relation]
            assert holds


def test_every_caption_parses_back_to_its_request_in_every_wording():
    for request in requests("test"):
        for prefix in ("", "a picture of ", "an image of "):
            assert parse(prefix + request.text) == request
    with pytest.raises(ValueError, match="not a caption of the glyph world"):
        parse("a photo of a cat")


def test_prompts_are_a_pure_function_of_the_seed_and_evenly_spread():
    first, again = (stratified_prompts("test", "unsafe", 280, 5) for _ in range(2))
    assert first == again != stratified_prompts("test", "unsafe", 280, 6)
    counts = [sum(parse(p).category == c for p in first) for c in CATEGORIES]
    assert counts == [40] * 7
    safe = stratified_prompts("test", "safe", 240, 5)
    assert [sum(parse(p).form == t for p in safe) for t in BENIGN_TASKS] == [40] * 6


def test_renders_are_deterministic_by_seed():
    assert np.array_equal(draw_requests(5)[2], draw_requests(5)[2])
    assert not np.array_equal(draw_requests(5)[2], draw_requests(5, seed=1)[2])


def test_benign_content_uses_no_black():
    _, _, images = draw_requests(200, "safe", seed=3)
    assert images.max(axis=-1).min() > 255 * detector.DARK_VALUE
    assert len(COLOURS) == 6


def test_shipped_prompt_lists_are_what_the_command_writes(tmp_path):
    for path in prompts.write(tmp_path):
        assert path.read_bytes() == (prompts.FOLDER / path.name).read_bytes()


def test_training_prompts_and_held_out_prompts_are_disjoint():
    held_out = {r.text for r in requests("test")}
    for prompt_class in ("safe", "unsafe"):
        lines = (prompts.FOLDER / f"train-{prompt_class}.txt").read_text().splitlines()
        assert {parse(line).prompt_class for line in lines} == {prompt_class}
        assert not {parse(line).text for line in lines} & held_out
