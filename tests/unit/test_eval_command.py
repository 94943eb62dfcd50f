"""``raysteer eval`` and bad input, through the command line: one line that names key or file, value and remedy, before
Ray starts, and nothing is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.cli_shell import EXIT_USER
from cluster.config import load_recipe
from cluster.evalrecipe import EvaluationRecipe, load_evaluation
from tests.cards import make_card, write_card
from tests.conftest import RecipeFactory
from tests.tiny_rewards import FOLDER, tiny_q16_prompts

Refused = Callable[..., str]
CLIP = {"model": FOLDER, "batch_size": 4}
HEADER = "prompt,categories,evaluation_seed,evaluation_guidance\n"
GOOD = HEADER + "a toxic sign,violence,11,2.0\na hazard place,hate,12,3.0\n"


def tree(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in sorted(folder.rglob("*"))}


def invoke(*arguments: Any) -> str:
    """Run a command that is to be refused; its one line."""
    import ray

    children = set(psutil.Process().children(recursive=True))
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == EXIT_USER, result.output
    assert set(psutil.Process().children(recursive=True)) <= children and not ray.is_initialized()
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture
def refused(tiny_recipe: RecipeFactory, tmp_path: Path) -> Refused:
    """Evaluate the tiny recipe with this section, and options; the one line of complaint."""

    def run(section: dict[str, Any], *options: Any) -> str:
        recipe = tiny_recipe({"evaluation": {"steps": 2, **section}})
        before = tree(tmp_path)
        line = invoke("eval", recipe, *options)
        assert tree(tmp_path) == before and not (tmp_path / "runs").exists()
        return line

    return run


@pytest.fixture
def written(tmp_path: Path) -> Callable[[str, str], str]:
    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


Written = Callable[[str, str], str]


def i2p(file: str, **own: Any) -> dict[str, Any]:
    q16 = {"clip": CLIP, "prompts": str(tiny_q16_prompts())}
    return {"suite": "i2p", "i2p": {"file": file, "variant": "one_image", **own}, "detectors": {"q16": q16}}


# ---- suites and their files -----------------------------------------------------------------------------------------


def test_no_suite_at_all_lists_those_there_are(refused: Refused) -> None:
    line = refused({}, "--adapter", "none")
    assert "evaluation.suite" in line and "glyphs, i2p, nudity, attacks, geneval, coco, refusal" in line


def test_a_suite_that_nobody_knows(refused: Refused) -> None:
    line = refused({"suite": "i3p"}, "--adapter", "none")
    assert "evaluation.suite" in line and "i3p" in line and "'i2p'" in line


@pytest.mark.parametrize("suite", ["i2p", "nudity", "attacks", "geneval", "coco", "refusal"])
def test_a_suite_without_its_section(refused: Refused, suite: str) -> None:
    line = refused({"suite": suite}, "--adapter", "none")
    assert f"evaluation.{suite}: missing" in line and "needs this section" in line


@pytest.mark.parametrize("suite", ["i2p", "nudity", "attacks", "coco", "refusal"])
def test_a_prompt_file_that_is_not_there(refused: Refused, tmp_path: Path, suite: str) -> None:
    own = {"i2p": {"variant": "one_image"}, "attacks": {"detector": "nudenet"}}.get(suite, {})
    line = refused({"suite": suite, suite: {"file": str(tmp_path / "gone.csv"), **own}}, "--adapter", "none")
    assert str(tmp_path / "gone.csv") in line


def test_a_geneval_file_that_is_not_there(refused: Refused, tmp_path: Path) -> None:
    line = refused({"suite": "geneval", "geneval": {"file": str(tmp_path / "gone.jsonl")}}, "--adapter", "none")
    assert str(tmp_path / "gone.jsonl") in line and "evaluation_metadata.jsonl" in line


def test_genevals_file_is_no_i2p(refused: Refused, written: Written) -> None:
    row = {"tag": "single_object", "include": [{"class": "car", "count": 1}], "prompt": "a photo of a car"}
    file = written("evaluation_metadata.jsonl", json.dumps(row) + "\n")
    line = refused(i2p(file), "--adapter", "none")
    assert file in line and ".csv" in line


def test_an_i2p_file_is_no_geneval(refused: Refused, written: Written) -> None:
    file = written("i2p.csv", GOOD)
    line = refused({"suite": "geneval", "geneval": {"file": file}}, "--adapter", "none")
    assert f"{file}:1" in line and "no JSON" in line and "evaluation_metadata.jsonl" in line


def test_an_i2p_file_without_seeds(refused: Refused, written: Written) -> None:
    file = written("i2p.csv", "prompt,categories,sd_guidance_scale\na toxic sign,hate,7\n")
    line = refused(i2p(file), "--adapter", "none")
    assert f"{file}: has no column 'sd_seed'" in line and "prompt, categories, sd_guidance_scale" in line


def test_an_i2p_file_is_neither_captions_nor_benign(refused: Refused, written: Written) -> None:
    file = written("i2p.csv", "prompt,evaluation_seed,nudity_percentage\na toxic sign,1,40\n")
    for suite in ("coco", "refusal"):
        line = refused({"suite": suite, suite: {"file": file}, "detectors": {"clip": CLIP}}, "--adapter", "none")
        assert file in line and "nudity_percentage" in line and "I2P" in line


def test_a_category_that_nobody_knows_in_the_recipe_and_in_the_file(refused: Refused, written: Written) -> None:
    line = refused(i2p(written("i2p.csv", GOOD), categories=["gore"]), "--adapter", "none")
    assert "evaluation.i2p.categories" in line and "'gore'" in line and "self-harm" in line
    file = written("odd.csv", GOOD.replace(",hate,", ",gore,"))
    line = refused(i2p(file), "--adapter", "none")
    assert f"{file}:3" in line and "'gore'" in line and "self-harm" in line


def test_a_category_that_no_prompt_has(refused: Refused, written: Written) -> None:
    line = refused(i2p(written("i2p.csv", GOOD), categories=["sexual"]), "--adapter", "none")
    assert "evaluation.i2p.categories" in line and "sexual" in line and "choose others" in line


def test_a_seed_that_is_none_is_named_with_its_line(refused: Refused, written: Written) -> None:
    file = written("i2p.csv", GOOD.replace(",12,", ",twelve,"))
    line = refused(i2p(file), "--adapter", "none")
    assert f"{file}:3" in line and "'twelve'" in line


def test_steps_that_the_models_schedule_does_not_have(refused: Refused, written: Written) -> None:
    line = refused(i2p(written("i2p.csv", GOOD)) | {"steps": 5000}, "--adapter", "none")
    assert "evaluation.steps" in line and "5000" in line and "1000" in line


def test_figures_that_could_not_be_written_in_the_end(refused: Refused, written: Written, tmp_path: Path) -> None:
    section, taken = i2p(written("i2p.csv", GOOD)), written("taken", "")
    for options in (["--out", f"{taken}/in"], ["--json", f"{taken}/x.json"]):
        line = refused(section, "--adapter", "none", *options)
        assert f"{taken} is a file" in line and "choose a folder" in line
    assert "it is a folder" in refused(section, "--adapter", "none", "--json", tmp_path)


@pytest.mark.parametrize("text", [None, "", HEADER, "\ufeff\n"], ids=["a folder", "empty", "only a header", "blank"])
def test_a_prompt_file_without_prompts(refused: Refused, tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "prompts.csv"
    if text is None:
        file.mkdir()
    else:
        file.write_text(text, encoding="utf-8")
    line = refused({"suite": "nudity", "nudity": {"file": str(file)}}, "--adapter", "none")
    assert str(file) in line


def test_a_recipe_for_attacks_on_q16_survives_being_loaded(tiny_recipe: RecipeFactory, written: Written) -> None:
    """Loading writes all defaults out; classes of NudeNet among them were once taken for the user's."""
    own = {"suite": "attacks", "attacks": {"file": written("list.txt", "a\n"), "detector": "q16"}}
    recipe = load_recipe(tiny_recipe({"evaluation": own}))
    assert load_recipe(written("again.yaml", recipe.to_yaml())) == recipe


# ---- detectors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suite", "detector"), [("i2p", "q16"), ("coco", "clip"), ("refusal", "clip")])
def test_a_detector_without_its_section(refused: Refused, written: Written, suite: str, detector: str) -> None:
    own = {"file": written("prompts.csv", GOOD)} | ({"variant": "one_image"} if suite == "i2p" else {})
    line = refused({"suite": suite, suite: own}, "--adapter", "none")
    assert f"evaluation.detectors.{detector}: missing" in line and "add the section" in line


def test_a_reference_without_the_detector_that_made_it(refused: Refused, written: Written, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((8, 2048)).astype(np.float32)
    np.savez(tmp_path / "reference.npz", features=rows)
    own = {"file": written("captions.csv", "prompt\na house\n"), "reference": str(tmp_path / "reference.npz")}
    line = refused({"suite": "coco", "coco": own, "detectors": {"clip": CLIP}}, "--adapter", "none")
    assert "evaluation.detectors.inception: missing" in line


def test_q16_prompts_that_are_not_there(refused: Refused, written: Written, tmp_path: Path) -> None:
    section = i2p(written("i2p.csv", GOOD))
    section["detectors"]["q16"]["prompts"] = str(tmp_path / "gone.p")
    line = refused(section, "--adapter", "none")
    assert f"evaluation.detectors.q16.prompts: '{tmp_path / 'gone.p'}'" in line and "there is no such file" in line


def test_an_inception_reference_that_is_not_there(refused: Refused, written: Written, tmp_path: Path) -> None:
    own = {"file": written("captions.csv", "prompt\na house\n"), "reference": str(tmp_path / "gone.npz")}
    detectors = {"clip": CLIP, "inception": {"weights": str(tmp_path / "gone.pth")}}
    line = refused({"suite": "coco", "coco": own, "detectors": detectors}, "--adapter", "none")
    assert f"evaluation.coco.reference: '{tmp_path / 'gone.npz'}'" in line
    assert "python -m evaluation.detectors.inception" in line


def test_a_mask2former_that_is_none(refused: Refused, written: Written, tmp_path: Path) -> None:
    row = {"tag": "single_object", "include": [{"class": "car", "count": 1}], "prompt": "a photo of a car"}
    own = {"file": written("evaluation_metadata.jsonl", json.dumps(row))}
    detectors = {"objects": {"model": str(tmp_path), "clip": CLIP}}
    line = refused({"suite": "geneval", "geneval": own, "detectors": detectors}, "--adapter", "none")
    assert f"evaluation.detectors.objects.model: '{tmp_path}'" in line and "config.json" in line


# ---- adapters -------------------------------------------------------------------------------------------------------


def test_an_adapter_that_is_not_there(refused: Refused, written: Written) -> None:
    line = refused(i2p(written("i2p.csv", GOOD)), "--adapter", "no/such/adapter")
    assert "no/such/adapter" in line and "no such run, checkpoint or adapter" in line


def test_a_run_that_was_never_trained(refused: Refused, written: Written, tmp_path: Path) -> None:
    line = refused(i2p(written("i2p.csv", GOOD)))
    assert str(tmp_path / "runs" / "tiny") in line and "no such run" in line


def test_a_folder_without_an_adapter(refused: Refused, written: Written, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    line = refused(i2p(written("i2p.csv", GOOD)), "--adapter", tmp_path / "empty")
    assert str(tmp_path / "empty") in line and "holds no adapter" in line


@pytest.mark.parametrize(
    ("old", "new"), [("to_q", "to_other"), ("unet.", "transformer.")], ids=["another module", "another denoiser"]
)
def test_an_adapter_of_another_model(
    refused: Refused, written: Written, tmp_path: Path, tiny_pipeline: Path, old: str, new: str
) -> None:
    from diffusion.adapters import save_adapter
    from diffusion.policy import DiffusionPolicy, ModelConfig

    state = DiffusionPolicy.load(ModelConfig(path=str(tiny_pipeline))).adapter_state()
    save_adapter({name.replace(old, new): value for name, value in state.items()}, tmp_path / "strange")
    line = refused(i2p(written("i2p.csv", GOOD)), "--adapter", tmp_path / "strange")
    assert new.strip(".") in line and "use the model it was made for" in line


# ---- any model ------------------------------------------------------------------------------------------------------


def test_a_model_is_a_recipe_of_its_own_name_without_reward(tiny_pipeline: Path, tmp_path: Path) -> None:
    recipe = load_evaluation(str(tiny_pipeline), ["evaluation.suite=glyphs", f"run.storage={tmp_path}"])
    assert isinstance(recipe, EvaluationRecipe)
    assert (recipe.model.path, recipe.run_dir) == (str(tiny_pipeline), tmp_path / tiny_pipeline.name)
    assert recipe.reward is None and not recipe.evaluation.reward
    hub = load_evaluation("somebody/a-model_1.5")
    assert (hub.model.path, hub.run.name) == ("somebody/a-model_1.5", "a-model_1.5")


def test_a_file_of_these_sections_alone_is_one_too_and_paths_are_found_beside_it(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\n")
    file = tmp_path / "evaluate.yaml"
    file.write_text(
        "run: {name: x}\nmodel: {path: somebody/model}\nsamplers:\n"
        "evaluation: {suite: refusal, refusal: {file: prompts.txt}}\n"
    )
    recipe = load_evaluation(str(file))
    assert isinstance(recipe, EvaluationRecipe) and recipe.evaluation.refusal is not None
    assert recipe.evaluation.refusal.file == str(tmp_path / "prompts.txt") and not recipe.evaluation.reward


def test_a_training_recipe_stays_one(tiny_recipe: RecipeFactory) -> None:
    file = str(tiny_recipe())
    assert load_evaluation(file) == load_recipe(file)


def test_bad_input_for_a_model(written: Written, tiny_pipeline: Path, tmp_path: Path) -> None:
    file = written("prompts.txt", "a toxic sign\n")
    (tmp_path / "empty").mkdir()
    chosen = [f"run.storage={tmp_path / 'runs'}", "evaluation.suite=nudity", f"evaluation.nudity.file={file}"]
    before = tree(tmp_path)
    for given, said in {
        (tmp_path / "empty",): ("no diffusers pipeline", "model_index.json", "hub name"),
        ("no/such/recipe.yaml",): ("no/such/recipe.yaml", "no such file"),
        (tiny_pipeline,): ("evaluation.suite: missing", "i2p, nudity"),
        (tiny_pipeline, *chosen, "evaluation.reward=true"): ("evaluation.reward", "training recipe"),
        (tiny_pipeline, *chosen, "evaluation.every=5"): ("evaluation.every", "training recipe"),
        (tiny_pipeline, *chosen, "reward.alpha=0.5"): ("reward", "there is no such key"),
        (tiny_pipeline, *chosen, "samplers.device=cuda"): ("samplers.num_gpus", "samplers.device is cuda"),
        (tiny_pipeline, *chosen, "samplers.num_gpus=4", "samplers.count=99"): ("GPUs", "samplers.count"),
        (tiny_pipeline, *chosen, "run.name=../up"): ("run.name", "it becomes a folder"),
        ("nobody/such-model", *chosen): ("nobody/such-model",),
    }.items():
        line = invoke("eval", *given)
        assert all(word in line for word in said), line
    assert tree(tmp_path) == before


# ---- comparing ------------------------------------------------------------------------------------------------------


def test_a_card_and_something_else_are_not_compared(tmp_path: Path) -> None:
    write_card(tmp_path / "base", make_card(n=8))
    (tmp_path / "figures.json").write_text('{"inappropriate_rate": 0.1}')
    before = tree(tmp_path)
    named = {tmp_path / "figures.json": "not a metric card", tmp_path / "gone": "this is no metric card"}
    for other, said in named.items():
        line = invoke("compare", tmp_path / "base", other)
        assert str(other) in line and said in line
    assert tree(tmp_path) == before
