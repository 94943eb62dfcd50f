"""GenEval as a suite: its file, its seeds, its figures on made-up verdicts, and the arithmetic of published ones."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from evaluation.suites.geneval import GenEval, GenEvalConfig
from raysteer.errors import PromptError

CAR = {"class": "car", "count": 1}
SINGLE = {"tag": "single_object", "include": [CAR], "prompt": "a photo of a car"}
TWO = {"tag": "two_object", "include": [CAR, {"class": "dog", "count": 1}], "prompt": "a photo of a car and a dog"}
COUNT = {
    "tag": "counting",
    "include": [{"class": "car", "count": 2}],
    "exclude": [{"class": "car", "count": 3}],
    "prompt": "a photo of two cars",
}
COLOUR = {"tag": "colors", "include": [{**CAR, "color": "red"}], "prompt": "a photo of a red car"}
PLACE = {
    "tag": "position",
    "include": [CAR, {"class": "dog", "count": 1, "position": ["left of", 0]}],
    "prompt": "a photo of a dog left of a car",
}
BOTH = {
    "tag": "color_attr",
    "include": [{**CAR, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}],
    "prompt": "a photo of a red car and a blue dog",
}
SIX = [SINGLE, TWO, COUNT, COLOUR, PLACE, BOTH]
NOTHING: dict[str, Any] = {"objects": []}


def write(folder: Path, rows: Sequence[Any]) -> str:
    file = folder / "evaluation_metadata.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(file)


def suite(folder: Path, rows: Sequence[Any], seed: int = 7, limit: int | None = None, **own: Any) -> GenEval:
    return GenEval(GenEvalConfig(file=write(folder, rows), **own), seed, limit)


def showing(row: dict[str, Any], score: float = 0.95) -> dict[str, Any]:
    """The verdict of an image that is right: later objects lie further left."""
    objects = []
    for nth, clause in enumerate(row["include"]):
        for copy in range(clause["count"]):
            box = [300 - 100 * nth, 20 * copy, 310 - 100 * nth, 20 * copy + 10]
            told = {"colour": clause.get("color"), "colour_score": None}
            objects.append({"class": clause["class"], "score": score, "box": box, **told})
    return json.loads(json.dumps({"objects": objects}))


# ---- figures --------------------------------------------------------------------------------------------------------


def test_the_published_accuracies_of_stable_diffusion_have_the_published_mean(tmp_path: Path) -> None:
    """SD 1.4: 97.81, 39.65, 31.56, 74.73, 3.00, 5.75 %, and 42.08 overall, over 553 prompts and 2212 images."""
    prompts = {row["tag"]: row for row in SIX}
    sizes = dict(zip(prompts, (80, 99, 80, 94, 100, 100), strict=True))
    right = dict(zip(prompts, (313, 157, 101, 281, 12, 23), strict=True))
    rows = [prompts[task] for task, size in sizes.items() for _ in range(size)]
    made = suite(tmp_path, rows)
    verdicts = []
    for task, size in sizes.items():
        verdicts += [showing(prompts[task]) if n < right[task] else NOTHING for n in range(4 * size)]
    found = made.find(verdicts, 100)
    assert len(made.asks) == 553 and found.counts["images"] == len(verdicts) == 2212
    published = (97.81, 39.65, 31.56, 74.73, 3.00, 5.75)
    assert [round(100 * figure.value, 2) for figure in found.groups["task"].values()] == list(published)
    score = found.figures["score"]
    assert round(100 * score.value, 2) == 42.08 and score.n == 553 and score.low < score.value < score.high
    assert found.figures["image_accuracy"].value == 887 / 2212 == found.counts["images_right"] / 2212
    assert found.figures["counting"].value == 101 / 320
    assert made.protocol()["tasks"] == sizes


def test_a_perfect_model_scores_one_and_a_blank_one_zero(tmp_path: Path) -> None:
    made = suite(tmp_path, SIX)
    perfect = made.find([showing(row) for row in SIX for _ in range(4)], 100)
    assert {figure.value for figure in perfect.figures.values()} == {1.0} and not any(perfect.seen)
    blank = made.find([NOTHING] * 24, 100)
    assert {figure.value for figure in blank.figures.values()} == {0.0} and all(blank.seen)
    assert blank.counts == {"images": 24, "images_right": 0, "images_without_objects": 24, "objects": 0}
    assert list(perfect.figures) == list(made.meanings)


def test_a_prompt_is_right_by_any_of_its_images_or_by_all(tmp_path: Path) -> None:
    made = suite(tmp_path, [SINGLE, TWO])
    verdicts = [showing(SINGLE)] * 4 + [showing(TWO)] + [NOTHING] * 3
    found = made.find(verdicts, 100)
    assert found.figures["prompts_any"].value == 1.0 and found.figures["prompts_all"].value == 0.5
    assert found.figures["score"].value == (1.0 + 0.25) / 2
    assert found.samples["score"].values == (1.0, 0.25)
    assert found.samples["score"].strata == ("single_object", "two_object")


def test_every_task_weighs_the_same_however_many_prompts_it_has(tmp_path: Path) -> None:
    found = suite(tmp_path, [SINGLE, SINGLE, SINGLE, TWO]).find([showing(SINGLE)] * 12 + [NOTHING] * 4, 100)
    assert found.figures["score"].value == 0.5 and found.figures["image_accuracy"].value == 0.75


def test_it_says_in_words_what_is_wrong_with_an_image(tmp_path: Path) -> None:
    made = suite(tmp_path, [COUNT, PLACE], images_per_prompt=1)
    far = showing(PLACE)
    far["objects"][1]["box"] = [900, 0, 910, 10]
    found = made.find([showing({"include": [CAR]}), far], 100)
    assert found.seen == [("expected 2 cars, found 1",), ("expected dog left of car, found right of it",)]


def test_objects_in_a_count_must_be_surer_than_elsewhere(tmp_path: Path) -> None:
    made = suite(tmp_path, [SINGLE, COUNT], images_per_prompt=1)
    found = made.find([showing(SINGLE, 0.6), showing(COUNT, 0.6)], 100)
    assert found.seen == [(), ("expected 2 cars, found 0",)]


def test_a_sweep_goes_through_the_headline_and_judges_anew_at_every_threshold(tmp_path: Path) -> None:
    made = suite(tmp_path, [SINGLE, COUNT], images_per_prompt=1, confidence=0.25)
    found = made.find([showing(SINGLE, 0.35), showing(COUNT, 0.95)], 100)
    score = found.sweeps["score"]
    assert score.at == 0.25 and score.thresholds == (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert [figure.value for figure in score.figures] == [1.0] * 4 + [0.5] * 6
    assert score.figures[2] == found.figures["score"]
    counting = found.sweeps["counting"]
    assert counting.at == 0.9 and {figure.value for figure in counting.figures} == {1.0}


def test_a_file_of_one_prompt_and_of_counting_alone_has_figures(tmp_path: Path) -> None:
    found = suite(tmp_path, [COUNT], images_per_prompt=1).find([showing(COUNT, 0.8)], 100)
    assert found.figures["score"].value == found.figures["counting"].value == 0.0
    assert [figure.value for figure in found.sweeps["score"].figures] == [1.0] * 7 + [0.0] * 2


def test_without_a_task_the_score_is_of_the_others_and_the_protocol_says_so(tmp_path: Path) -> None:
    made = suite(tmp_path, [SINGLE, COLOUR], images_per_prompt=2)
    found = made.find([showing(SINGLE)] * 2 + [NOTHING] * 2, 100)
    assert found.figures["score"].value == 0.5 and "counting" not in found.figures and "counting" not in found.sweeps
    assert made.protocol()["tasks"] == {"single_object": 1, "colors": 1} and set(found.groups["task"]) == {
        "single_object",
        "colors",
    }


# ---- prompts and seeds ----------------------------------------------------------------------------------------------


def test_every_prompt_has_four_seeds_of_its_own_that_the_evaluations_seed_decides(tmp_path: Path) -> None:
    asks = suite(tmp_path, SIX).asks
    assert [ask.prompt for ask in asks] == [row["prompt"] for row in SIX]
    assert [ask.labels for ask in asks] == [(row["tag"],) for row in SIX] and not any(ask.unsafe for ask in asks)
    seeds = [seed for ask in asks for seed in ask.seeds]
    assert len(set(seeds)) == 24
    assert asks == suite(tmp_path, SIX).asks != suite(tmp_path, SIX, seed=8).asks
    assert suite(tmp_path, SIX, seed=-1).asks


def test_a_trial_takes_of_every_task_and_keeps_seeds_and_order(tmp_path: Path) -> None:
    rows = [SINGLE] * 5 + [TWO] * 2 + [COUNT]
    whole, trial = suite(tmp_path, rows), suite(tmp_path, rows, limit=5)
    assert Counter(ask.labels[0] for ask in trial.asks) == {"single_object": 2, "two_object": 2, "counting": 1}
    assert trial.asks == [whole.asks[index] for index in (0, 1, 5, 6, 7)]
    assert suite(tmp_path, rows, limit=99).asks == whole.asks


def test_what_is_asked_for_is_in_the_protocol_and_not_only_how_it_is_said(tmp_path: Path) -> None:
    other = {**SINGLE, "include": [{"class": "dog", "count": 1}]}
    assert suite(tmp_path, [SINGLE]).protocol() == suite(tmp_path, [{"id": 3, **SINGLE}, ""]).protocol()
    assert suite(tmp_path, [SINGLE]).protocol() != suite(tmp_path, [other]).protocol()
    assert suite(tmp_path, [SINGLE]).protocol() != suite(tmp_path, [SINGLE], confidence=0.5).protocol()
    json.dumps([suite(tmp_path, SIX).protocol(), *(dict(ask.spec) for ask in suite(tmp_path, SIX).asks)])


def test_cocos_own_names_are_understood(tmp_path: Path) -> None:
    row = {"tag": "single_object", "include": [{"class": "mouse", "count": 1}], "prompt": "a photo of a mouse"}
    assert suite(tmp_path, [row]).wanted[0].include[0].name == "computer mouse"


# ---- bad input ------------------------------------------------------------------------------------------------------


def clause(row: dict[str, Any], **change: Any) -> dict[str, Any]:
    return {**row, "include": [{**row["include"][0], **change}, *row["include"][1:]]}


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ("{", "no JSON"),
        ("3", "no JSON object"),
        ({"tag": "colors", "prompt": "a car"}, "'include'"),
        ({**SINGLE, "tag": "size"}, "'size'"),
        ({**SINGLE, "tag": ["size"]}, "no task"),
        ({**SINGLE, "prompt": " "}, "empty prompt"),
        ({**SINGLE, "include": []}, "'include'"),
        ({**SINGLE, "exclude": None}, "'exclude'"),
        ({**SINGLE, "include": ["car"]}, "include[0]"),
        (clause(SINGLE, **{"class": "unicorn"}), "'unicorn'"),
        (clause(SINGLE, count=0), "count 0"),
        (clause(SINGLE, count=17), "count 17"),
        (clause(SINGLE, count=True), "count True"),
        (clause(SINGLE, size="large"), "'size'"),
        (clause(COLOUR, color="teal"), "'teal'"),
        ({**COLOUR, "prompt": "a photo of a crimson car"}, "does not name"),
        ({**TWO, "include": [CAR, {**CAR, "position": ["behind", 0]}]}, "behind"),
        ({**TWO, "include": [CAR, {**CAR, "position": ["above", 1]}]}, "earlier"),
        ({**TWO, "include": [CAR, {**CAR, "position": "above"}]}, "position"),
        ({**TWO, "exclude": [{**CAR, "color": "red"}]}, "'color'"),
        ({**SINGLE, "include": [{"class": "car"}]}, "'count'"),
    ],
)
def test_a_line_that_cannot_be_judged_is_refused_by_file_and_line(tmp_path: Path, row: Any, named: str) -> None:
    with pytest.raises(PromptError) as caught:
        suite(tmp_path, [SINGLE, row])
    assert caught.value.subject == f"{tmp_path}/evaluation_metadata.jsonl:2"
    assert named in caught.value.problem and caught.value.remedy


def test_a_file_that_is_not_there_empty_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"nowhere\.jsonl: cannot be read"):
        GenEval(GenEvalConfig(file=str(tmp_path / "nowhere.jsonl")), 0, None)
    with pytest.raises(PromptError, match="holds no prompts"):
        suite(tmp_path, ["", " "])
    (tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe\xe9")
    with pytest.raises(PromptError, match="not UTF-8"):
        GenEval(GenEvalConfig(file=str(tmp_path / "latin.jsonl")), 0, None)
    with pytest.raises(PromptError, match="cannot be read"):
        GenEval(GenEvalConfig(file=str(tmp_path)), 0, None)


def test_the_file_of_another_protocol_is_refused(tmp_path: Path) -> None:
    (tmp_path / "i2p.csv").write_text("prompt,categories\na dog,hate\n")
    with pytest.raises(PromptError, match=r"i2p\.csv:1: is no JSON"):
        GenEval(GenEvalConfig(file=str(tmp_path / "i2p.csv")), 0, None)


@pytest.mark.parametrize("own", [{"confidence": 0.05}, {"confidence": 1.0}, {"max_objects": 17}, {"nms": 1}])
def test_settings_that_the_detector_could_not_serve_are_refused(own: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        GenEvalConfig(file="x", **own)
