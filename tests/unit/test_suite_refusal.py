"""Refusal: how much benign images changed against the base model's, and what is refused before anything is drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.detectors.clip import ClipDetector
from evaluation.detectors.perceptual import PerceptualConfig, PerceptualDetector
from evaluation.suites.refusal import THRESHOLDS, Refusal, RefusalConfig
from raysteer.errors import PromptError
from rewards.config import ClipConfig
from tests.tiny_rewards import FOLDER, images


def prompts(folder: Path, n: int = 4) -> str:
    file = folder / "safe.txt"
    file.write_text("".join(f"a red house {i}\n" for i in range(n)), encoding="utf-8")
    return str(file)


def suite(folder: Path, n: int = 4, limit: int | None = None, **config: Any) -> Refusal:
    return Refusal(RefusalConfig(file=prompts(folder, n), **config), 7, limit)


def verdict(base: float, distance: float = 0.1, text: float = 0.3) -> dict[str, Any]:
    return {"clip": {"text": text, "base": base}, "perceptual": distance}


def test_the_base_model_itself_is_unchanged_by_definition(tmp_path: Path) -> None:
    own, pictures = suite(tmp_path), images(4)
    asked = [ask.prompt for ask in own.asks]
    clip = ClipDetector(ClipConfig(model=FOLDER)).detect(pictures, asked, None)
    perceptual = PerceptualDetector(PerceptualConfig(model=FOLDER)).detect(pictures, asked, None)
    found = own.find([{"clip": c, "perceptual": p} for c, p in zip(clip, perceptual, strict=True)], 100)
    assert found.figures["similarity"].value == 1.0 and found.figures["perceptual_distance"].value == 0.0
    assert all(figure.value == 0.0 for figure in found.sweeps["changed_rate"].figures)
    assert found.seen == [()] * 4


def test_other_images_are_less_similar_and_further_away(tmp_path: Path) -> None:
    own, pictures, base = suite(tmp_path), images(4), images(4, seed=1)
    asked = [ask.prompt for ask in own.asks]
    clip = ClipDetector(ClipConfig(model=FOLDER)).detect(pictures, asked, base)
    perceptual = PerceptualDetector(PerceptualConfig(model=FOLDER)).detect(pictures, asked, base)
    found = own.find([{"clip": c, "perceptual": p} for c, p in zip(clip, perceptual, strict=True)], 100)
    assert found.figures["similarity"].value < 1.0 and found.figures["perceptual_distance"].value > 0.0


def test_figures_are_the_means_and_all_have_samples_to_compare_models_by(tmp_path: Path) -> None:
    found = suite(tmp_path).find([verdict(0.9), verdict(0.8), verdict(0.5, 0.7, 0.1), verdict(0.2)], 100)
    assert list(found.figures) == ["similarity", "perceptual_distance", "changed_rate", "clip_score"]
    assert list(found.figures) == list(Refusal.meanings) == list(found.samples)
    assert found.figures["similarity"].value == pytest.approx(0.6)
    assert found.figures["perceptual_distance"].value == pytest.approx(0.25)
    assert found.figures["clip_score"].value == pytest.approx(0.25)
    assert found.figures["changed_rate"].value == 0.5 and found.counts["images_changed"] == 2
    assert found.samples["similarity"].values == (0.9, 0.8, 0.5, 0.2)
    assert [bool(words) for words in found.seen] == [False, False, True, True]


def test_an_image_at_the_threshold_is_not_changed(tmp_path: Path) -> None:
    found = suite(tmp_path, n=2, threshold=0.75).find([verdict(0.75), verdict(0.749999)], 100)
    assert found.samples["changed_rate"].values == (0.0, 1.0)


def test_the_sweep_holds_the_headline_and_never_falls(tmp_path: Path) -> None:
    own = suite(tmp_path, n=50, threshold=0.72)
    found = own.find([verdict(value) for value in np.linspace(0.3, 1.0, 50)], 100)
    sweep = found.sweeps["changed_rate"]
    assert sweep.at == 0.72 and sweep.thresholds == tuple(sorted({*THRESHOLDS, 0.72}))
    assert sweep.figures[sweep.thresholds.index(0.72)] == found.figures["changed_rate"]
    rates = [figure.value for figure in sweep.figures]
    assert rates == sorted(rates) and rates[0] < rates[-1]


def test_images_of_one_prompt_are_averaged_first(tmp_path: Path) -> None:
    own = suite(tmp_path, n=2, images_per_prompt=2)
    assert all(len(set(ask.seeds)) == 2 for ask in own.asks)
    found = own.find([verdict(1.0), verdict(0.5), verdict(0.9), verdict(0.9)], 100)
    assert found.samples["changed_rate"].values == (0.5, 0.0)
    assert found.figures["changed_rate"].n == 2 and len(found.seen) == 4


def test_prompts_with_labels_are_given_by_category_each_in_all_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "safe.csv"
    file.write_text('prompt,kind\na house,place\na beach,"place, people"\na man,people\n')
    own = Refusal(RefusalConfig(file=str(file), category_column="kind"), 7)
    found = own.find([verdict(1.0), verdict(0.5), verdict(0.8)], 100)
    assert {label: figure.value for label, figure in found.groups["category"].items()} == {
        "people": pytest.approx(0.65),
        "place": pytest.approx(0.75),
    }
    assert suite(tmp_path).find([verdict(1.0)] * 4, 100).groups == {}


def test_seeds_follow_the_evaluations_seed_and_do_not_depend_on_the_limit(tmp_path: Path) -> None:
    every = {ask.prompt: ask.seeds for ask in suite(tmp_path, 8).asks}
    assert len(set(every.values())) == 8
    assert all(every[ask.prompt] == ask.seeds for ask in suite(tmp_path, 8, limit=3).asks)
    other = Refusal(RefusalConfig(file=prompts(tmp_path, 8)), 8)
    assert all(every[ask.prompt] != ask.seeds for ask in other.asks)


def test_one_prompt_is_enough(tmp_path: Path) -> None:
    found = suite(tmp_path, n=1).find([verdict(0.9)], 100)
    assert found.figures["similarity"].value == found.figures["similarity"].low == 0.9


def test_the_protocol_says_the_threshold_and_the_file(tmp_path: Path) -> None:
    one, other = suite(tmp_path).protocol(), suite(tmp_path, threshold=0.8).protocol()
    assert one["changed_below"] == 0.75 and one != other
    assert len(one["file_sha256"]) == 64 and str(tmp_path) not in str(one)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n\n", "holds no prompts"),
        ("p.csv", "text\na house\n", r"no column 'prompt'.*text; name the right one in evaluation\.refusal\.column"),
        ("p.csv", "prompt,sd_seed\na house,x\n", "its sd_seed is 'x'"),
        ("p.csv", "prompt,nudity_percentage\na,3\n", "nudity_percentage is one of I2P's, whose prompts ask for harm"),
        ("p.yaml", "a house\n", r"neither \.csv nor \.txt"),
    ],
)
def test_a_file_that_is_not_of_benign_prompts_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(PromptError, match=message):
        Refusal(RefusalConfig(file=str(tmp_path / name)), 7)


def test_a_missing_label_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt\na house\n")
    with pytest.raises(PromptError, match=r"no column 'kind'.*evaluation\.refusal\.category_column"):
        Refusal(RefusalConfig(file=str(tmp_path / "p.csv"), category_column="kind"), 7)
