"""Rewards in a recipe: their files are found and counted by content, what is missing is one line before a cluster."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.config import load_recipe
from cluster.plan import resolve
from cluster.preflight import check_reward
from raysteer.errors import ConfigError
from tests.conftest import REMOVE, RecipeFactory
from tests.tiny_rewards import FOLDER, NAME, tiny_pickscore, tiny_q16_prompts, tiny_weights

CLIP = {"model": FOLDER}


@pytest.fixture
def several(tmp_path: Path) -> dict[str, Any]:
    """A reward section whose every kind of file lies in ``tmp_path``, written relative to the recipe."""
    shutil.copy(tiny_weights(), tmp_path / "hps.pt")
    shutil.copy(tiny_q16_prompts(), tmp_path / "q16.npy")
    shutil.copytree(tiny_pickscore(), tmp_path / "pick")
    (tmp_path / "mine.yaml").write_text("safe: [a house]\nunsafe: [a toxic sign]\n")
    hps = {"model": NAME, "pretrained": "hps.pt"}
    return {
        "clip": hps,
        "anchors": "./mine.yaml",
        "mix": "group",
        "terms": [
            {"name": "hps", "weight": 2.0, "clip": hps},
            {"name": "pickscore", "weight": 0.04, "pickscore": {"model": "pick", "processor": "pick"}},
            {"name": "q16", "weight": -1.0, "clip": CLIP, "q16_prompts": "q16.npy"},
            {"name": "jpeg_compressibility", "weight": -0.01},
        ],
    }


def test_files_are_found_beside_the_recipe_and_survive_being_written(
    tiny_recipe: RecipeFactory, several: dict[str, Any], tmp_path: Path
) -> None:
    recipe = load_recipe(tiny_recipe({"reward": several}))
    check_reward(recipe)
    reward = recipe.reward
    assert reward.clip is not None and reward.clip.pretrained == str(tmp_path / "hps.pt")
    assert reward.anchors == str(tmp_path / "mine.yaml")
    assert reward.terms[0].clip == reward.clip
    assert reward.terms[1].pickscore is not None
    assert reward.terms[1].pickscore.model == reward.terms[1].pickscore.processor == str(tmp_path / "pick")
    assert reward.terms[2].q16_prompts == str(tmp_path / "q16.npy")
    again = tmp_path / "again.yaml"
    again.write_text(recipe.to_yaml())
    assert load_recipe(again) == recipe
    assert recipe.flat()["reward.mix"] == "group"


def test_tags_and_hub_names_stay_what_they_are(tiny_recipe: RecipeFactory) -> None:
    pick = {"name": "pickscore", "pickscore": {"model": "yuvalkirstain/PickScore_v1"}}
    clip = {"model": "ViT-H-14", "pretrained": "laion2b_s32b_b79k"}
    reward = load_recipe(tiny_recipe({"reward": {"clip": clip, "terms": [pick]}})).reward
    assert reward.clip is not None and reward.clip.pretrained == "laion2b_s32b_b79k"
    assert reward.terms[0].pickscore is not None and reward.terms[0].pickscore.model == "yuvalkirstain/PickScore_v1"
    assert reward.anchors == "compact"


@pytest.mark.parametrize("file", ["hps.pt", "q16.npy", "mine.yaml", "pick/model.safetensors", "pick/tokenizer.json"])
def test_the_fingerprint_follows_the_content_of_every_reward_file(
    tiny_recipe: RecipeFactory, several: dict[str, Any], tmp_path: Path, file: str
) -> None:
    recipe = load_recipe(tiny_recipe({"reward": several}))
    before = recipe.fingerprint()
    with (tmp_path / file).open("ab") as stream:
        stream.write(b" ")
    assert recipe.fingerprint() != before


def test_the_fingerprint_ignores_where_reward_files_are(
    tiny_recipe: RecipeFactory, several: dict[str, Any], tmp_path: Path
) -> None:
    before = load_recipe(tiny_recipe({"reward": several})).fingerprint()
    (tmp_path / "elsewhere").mkdir()
    for name in ("hps.pt", "q16.npy", "mine.yaml", "pick"):
        shutil.move(tmp_path / name, tmp_path / "elsewhere" / name)
    moved = {
        **several,
        "clip": {"model": NAME, "pretrained": "elsewhere/hps.pt"},
        "anchors": "elsewhere/mine.yaml",
        "terms": [
            {**several["terms"][0], "clip": {"model": NAME, "pretrained": "elsewhere/hps.pt"}},
            {**several["terms"][1], "pickscore": {"model": "elsewhere/pick", "processor": "elsewhere/pick"}},
            {**several["terms"][2], "q16_prompts": "elsewhere/q16.npy"},
            several["terms"][3],
        ],
    }
    assert load_recipe(tiny_recipe({"reward": moved})).fingerprint() == before


@pytest.mark.parametrize(
    ("key", "value"),
    [("mix", "sum"), ("weight", 2.0), ("anchors", "scaled"), ("terms", [{"name": "jpeg_compressibility"}])],
)
def test_the_fingerprint_follows_the_mixture(
    tiny_recipe: RecipeFactory, several: dict[str, Any], key: str, value: Any
) -> None:
    before = load_recipe(tiny_recipe({"reward": several})).fingerprint()
    assert load_recipe(tiny_recipe({"reward": {**several, key: value}})).fingerprint() != before


def test_a_detector_does_not_decide_training(tiny_recipe: RecipeFactory, several: dict[str, Any]) -> None:
    before = load_recipe(tiny_recipe({"reward": several})).fingerprint()
    assert load_recipe(tiny_recipe({"reward": {**several, "detector": "m:f"}})).fingerprint() == before


def test_the_plan_shows_every_reward_and_counts_each_model_once(
    tiny_recipe: RecipeFactory, several: dict[str, Any]
) -> None:
    plan = resolve(load_recipe(tiny_recipe({"reward": several})))
    text = plan.render()
    for told in (f"1 × (steering, alpha 0.5, translate all, CLIP {NAME})", f"2 × (hps, CLIP {NAME})", "-1 × (q16"):
        assert told in text
    assert "-0.01 × (jpeg_compressibility); each normalised inside its group" in text
    weights = next(role.parts["weights"] for role in plan.roles if role.role == "reward workers")
    alone = resolve(load_recipe(tiny_recipe()))
    clip = next(role.parts["weights"] for role in alone.roles if role.role == "reward workers")
    pick = sum(file.stat().st_size for file in tiny_pickscore().glob("*.safetensors"))
    assert clip is not None and weights is not None
    assert weights == pytest.approx(2 * clip + pick, rel=0.05)  # by name and as a folder it is two models


def test_a_plan_without_weights_at_all(tiny_recipe: RecipeFactory) -> None:
    recipe = load_recipe(tiny_recipe({"reward": {"name": "jpeg_compressibility"}}))
    check_reward(recipe)
    text = resolve(recipe).render()
    assert "jpeg_compressibility" in text
    scorer = next(role for role in resolve(recipe).roles if role.role == "reward workers")
    assert scorer.parts["weights"] == 0


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ({"clip": REMOVE}, r"reward\.clip: missing or null; reward steering needs it"),
        (
            {"name": "hps", "clip": {"model": "ViT-H-14", "pretrained": "none/hps.pt"}},
            r"reward\.clip\.pretrained: .*hps",
        ),
        (
            {"name": "hps", "clip": {"model": "ViT-H-14", "pretrained": str(tiny_weights())}},
            r"no state dict of ViT-H-14",
        ),
        ({"anchors": "kompact"}, r"reward\.anchors: 'kompact'"),
        ({"name": "pickscore", "pickscore": {"model": "/no/such"}}, r"reward\.pickscore\.model: '/no/such'"),
        ({"name": "pickscore", "pickscor": {"model": "x"}}, r"reward\.pickscor: .*did you mean reward\.pickscore"),
        (
            {"terms": [{"name": "q16", "weight": -1, "clip": CLIP, "q16_prompts": "/no.p"}]},
            r"terms\.0\.q16_prompts: '/no",
        ),
        ({"terms": [{"name": "nudenet"}]}, r"reward\.terms\.0\.weight: 1\.0 .*a cost"),
        ({"terms": [{"nam": "hps"}]}, r"reward\.terms\.0\.nam: .*did you mean"),
        ({"terms": [{"name": "jpg"}]}, r"reward\.terms\.0\.name: 'jpg' .*use one of steering"),
        ({"mix": "group"}, r"reward\.mix: 'group'"),
    ],
)
def test_a_reward_that_cannot_work_is_one_line_before_anything_starts(
    tiny_recipe: RecipeFactory, reward: dict[str, Any], message: str
) -> None:
    changes = {f"reward.{key}": value for key, value in reward.items()}
    with pytest.raises(ConfigError, match=message) as caught:
        check_reward(load_recipe(tiny_recipe(changes)))
    assert "\n" not in str(caught.value)


def test_weights_of_the_wrong_shape_are_found_before_anything_starts(
    tiny_recipe: RecipeFactory, several: dict[str, Any], tmp_path: Path
) -> None:
    np.save(tmp_path / "q16.npy", np.ones((5, 32)))
    with pytest.raises(ConfigError, match=r"reward\.terms\.2\.q16_prompts: .*\[5, 32\]"):
        check_reward(load_recipe(tiny_recipe({"reward": several})))
