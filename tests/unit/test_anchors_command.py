"""``raysteer anchors``: how anchor sets separate prompts, in numbers, as a table, as a picture."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cluster.anchors import gather_prompts, separation, study, summary, write
from cluster.cli import app
from cluster.cli_shell import EXIT_USER
from cluster.config import Recipe, load_recipe
from raysteer.errors import ConfigError, PromptError
from rewards.anchors import load_anchors
from rewards.config import RewardConfig
from rewards.steering import SteeringReward
from tests.conftest import REMOVE, RecipeFactory
from tests.tiny_rewards import FOLDER

SAFE = ["a red circle", "a blue square", "a green triangle"]
UNSAFE = ["a toxic sign", "a hazard place"]


def quiet(recipe: Recipe, **given: Any) -> Any:
    return study(recipe, notify=lambda _: None, **given)


def test_auc_is_the_share_of_pairs_in_order_and_a_tie_is_half() -> None:
    rng = np.random.default_rng(0)
    higher, lower = rng.integers(0, 9, 40).astype(float), rng.integers(0, 9, 30).astype(float)
    pairs = higher[:, None] - lower
    assert separation(higher, lower) == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean(), abs=1e-12)
    assert separation(np.array([1.0, 2.0]), np.array([0.0])) == 1.0
    assert separation(np.array([0.0]), np.array([1.0, 2.0])) == 0.0
    assert separation(np.ones(3), np.ones(5)) == 0.5


def test_scores_are_those_the_steering_reward_goes_by(tiny_recipe: RecipeFactory) -> None:
    report = quiet(load_recipe(tiny_recipe()))
    assert [row.name for row in report.sets] == ["compact", "scaled", "unsafe_only"]
    assert report.used == "compact"
    assert report.counts == {"safe": 3, "unsafe": 2}
    for row in report.sets:
        reward = SteeringReward(RewardConfig.model_validate({"clip": {"model": FOLDER}, "anchors": row.name}))
        for side, prompts in (("safe", SAFE), ("unsafe", UNSAFE)):
            expected = reward.clip.encode_texts(prompts) @ reward.v_safe
            np.testing.assert_allclose(row.scores[side], expected, atol=1e-6)
            assert row.steered_share(side) == np.mean(expected < 0)


def test_the_recipes_own_set_comes_first_and_may_be_a_file_or_inline(
    tiny_recipe: RecipeFactory, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("safe: [a house]\nunsafe: [a toxic sign]\n")
    filed = quiet(load_recipe(tiny_recipe({"reward.anchors": str(tmp_path / "mine.yaml")})))
    inline = quiet(load_recipe(tiny_recipe({"reward.anchors": {"safe": ["a house"], "unsafe": ["a toxic sign"]}})))
    assert [row.name for row in filed.sets] == ["mine", "compact", "scaled", "unsafe_only"]
    assert inline.sets[0].name == inline.used == "the recipe's own"
    for side in ("safe", "unsafe"):
        assert np.array_equal(filed.sets[0].scores[side], inline.sets[0].scores[side])
    (tmp_path / "compact.yaml").write_text("safe: [a house]\nunsafe: [a toxic sign]\n")
    twice = quiet(load_recipe(tiny_recipe({"reward.anchors": str(tmp_path / "compact.yaml")})))
    assert [row.name for row in twice.sets] == ["compact (the recipe's own)", "compact", "scaled", "unsafe_only"]


def test_the_anchors_themselves_are_told_apart_perfectly(tiny_recipe: RecipeFactory, tmp_path: Path) -> None:
    own = {"safe": ["a house", "a cat"], "unsafe": ["a toxic sign", "a hazard"]}
    for side, phrases in own.items():
        (tmp_path / f"own-{side}.txt").write_text("\n".join(phrases))
    files = {side: str(tmp_path / f"own-{side}.txt") for side in own}
    row = quiet(load_recipe(tiny_recipe({"reward.anchors": own})), **files).sets[0]
    assert row.auc == 1.0
    swapped = {"safe": own["unsafe"], "unsafe": own["safe"]}
    assert quiet(load_recipe(tiny_recipe({"reward.anchors": swapped})), **files).sets[0].auc == 0.0


def test_the_sweep_holds_the_recipes_alpha_and_starts_unmoved(tiny_recipe: RecipeFactory) -> None:
    data = quiet(load_recipe(tiny_recipe({"reward.alpha": 0.37}))).as_json()
    for row in data["sets"]:
        alphas = [point["alpha"] for point in row["sweep"]]
        assert alphas == sorted(alphas)
        assert 0.37 in alphas and alphas[0] == 0.0 and alphas[-1] == 2.0
        assert row["sweep"][0]["safe"]["mean"] == row["sweep"][0]["unsafe"]["q05"] == 1.0
        assert 0.0 <= row["auc"] <= 1.0
        assert {"mean", "q05", "q25", "q50", "q75", "q95", "steered"} == set(row["safe"])
    assert quiet(load_recipe(tiny_recipe({"reward.alpha": 3.0}))).alphas[-1] == 6.0


def test_numbers_and_picture_are_written(tiny_recipe: RecipeFactory, tmp_path: Path) -> None:
    report = quiet(load_recipe(tiny_recipe()))
    data, picture = write(report, tmp_path / "new" / "out")
    assert json.loads(data.read_text()) == report.as_json()
    with Image.open(picture) as image:
        assert image.width > 1000 and image.height > 600
        assert len(image.convert("RGB").getcolors(10**6) or []) > 20


def test_a_shipped_set_without_a_direction_in_this_clip_is_shown_as_such(tiny_recipe: RecipeFactory) -> None:
    from cluster.anchors import _report

    class Blind:
        def encode_texts(self, texts: Any) -> np.ndarray:
            return np.tile(np.array([1.0, 0.0], np.float32), (len(texts), 1))

    row = _report("compact", load_anchors("compact"), Blind(), {"safe": np.eye(2), "unsafe": np.eye(2)}, needed=False)  # type: ignore[arg-type]
    assert row.problem is not None and "same point" in row.problem
    with pytest.raises(ConfigError, match="same point"):
        _report("compact", load_anchors("compact"), Blind(), {}, needed=True)  # type: ignore[arg-type]


# ---- prompts -----------------------------------------------------------------------------------------------


def test_given_files_replace_the_recipes_prompts_side_by_side(tiny_recipe: RecipeFactory, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("prompt,categories\nan odd prompt,hate\nanother,shocking\n")
    recipe = load_recipe(tiny_recipe())
    assert gather_prompts(recipe, {"safe": None, "unsafe": None}, 10) == {"safe": SAFE, "unsafe": UNSAFE}
    given = gather_prompts(recipe, {"safe": None, "unsafe": str(tmp_path / "mine.csv")}, 10)
    assert given == {"safe": SAFE, "unsafe": ["an odd prompt", "another"]}


def test_of_many_prompts_a_fixed_sample_is_taken_across_sources(tiny_recipe: RecipeFactory, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {k}\n" for k in range(100)))
    classes = {"a": "safe", "b": "utility", "c": "unsafe"}
    sources = [{"path": str(tmp_path / f"{name}.txt"), "class": kind} for name, kind in classes.items()]
    recipe = load_recipe(tiny_recipe({"prompts": {"sources": sources}}))
    chosen = gather_prompts(recipe, {"safe": None, "unsafe": None}, 40)
    assert [len(texts) for texts in chosen.values()] == [40, 40]
    assert {text[0] for text in chosen["safe"]} == {"a", "b"}
    assert len(set(chosen["safe"])) == 40
    assert chosen == gather_prompts(recipe, {"safe": None, "unsafe": None}, 40)
    steps = {int(text.split()[1]) % 5 for text in chosen["unsafe"]}
    assert steps == set(range(5))  # no even steps, which would meet the periods of a list


def test_prompts_that_cannot_be_used_are_named(tiny_recipe: RecipeFactory, tmp_path: Path) -> None:
    recipe = load_recipe(tiny_recipe())
    with pytest.raises(PromptError, match=r"prompts\.doc: has no known suffix; give a file that ends with \.txt"):
        quiet(recipe, safe="prompts.doc")
    with pytest.raises(PromptError, match=r"none\.txt: cannot be read"):
        quiet(recipe, unsafe=str(tmp_path / "none.txt"))
    source = {"path": str(tmp_path / "safe.txt"), "class": "safe"}
    only_safe = load_recipe(tiny_recipe({"prompts": {"sources": [source], "unsafe_fraction": 0.0}}))
    with pytest.raises(PromptError, match=r"the recipe's unsafe prompts: there are none; give some with --unsafe FILE"):
        quiet(only_safe)
    assert quiet(only_safe, unsafe=str(tmp_path / "unsafe.txt")).counts == {"safe": 3, "unsafe": 2}


# ---- the recipe and the command ----------------------------------------------------------------------------


def test_the_steering_term_is_studied_wherever_it_stands(tiny_recipe: RecipeFactory) -> None:
    steering = {"name": "steering", "clip": {"model": FOLDER}, "alpha": 0.7, "anchors": "unsafe_only"}
    reward = {"name": "jpeg_compressibility", "terms": [steering]}
    report = quiet(load_recipe(tiny_recipe({"reward": reward})))
    assert (report.used, report.term.alpha) == ("unsafe_only", 0.7)
    reward["terms"] = [{**steering, "anchors": "kompact"}]
    with pytest.raises(ConfigError, match=r"reward\.terms\.0\.anchors: 'kompact'"):
        quiet(load_recipe(tiny_recipe({"reward": reward})))
    with pytest.raises(ConfigError, match=r"reward\.clip: missing or null; anchors are phrases in a CLIP's text space"):
        quiet(load_recipe(tiny_recipe({"reward": {"name": "jpeg_compressibility"}})))


def test_any_clip_of_the_recipe_will_do_and_then_no_set_is_the_recipes(tiny_recipe: RecipeFactory) -> None:
    report = quiet(load_recipe(tiny_recipe({"reward.name": "clip"})))
    assert report.used is None
    assert "*" not in report.legend()


def test_the_command_prints_a_line_for_every_set_and_says_where_the_rest_is(
    tiny_recipe: RecipeFactory, tmp_path: Path
) -> None:
    done = CliRunner().invoke(app, ["anchors", str(tiny_recipe()), "reward.alpha=0.5", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    rows = {line.split()[0]: line for line in done.output.splitlines() if line and line[0] != " "}
    assert rows["compact"].split()[1:5] == ["*", "5", "+", "3"]
    assert rows["scaled"].split()[1:4] == ["25", "+", "20"]
    assert "kept at alpha 0.5" in done.output
    assert {"anchors.json", "anchors.png"} == {file.name for file in (tmp_path / "out").iterdir()}
    default = CliRunner().invoke(app, ["anchors", str(tiny_recipe())])
    assert default.exit_code == 0
    assert (tmp_path / "runs" / "tiny-anchors" / "anchors.png").is_file()


def test_the_command_fails_in_one_line(tiny_recipe: RecipeFactory) -> None:
    refused = CliRunner().invoke(app, ["anchors", str(tiny_recipe({"reward.clip": REMOVE}))])
    assert refused.exit_code == EXIT_USER
    assert "reward.clip: missing or null" in refused.output


def test_a_summary_is_the_mean_and_five_quantiles() -> None:
    told = summary(np.arange(101.0))
    assert told == {"mean": 50.0, "q05": 5.0, "q25": 25.0, "q50": 50.0, "q75": 75.0, "q95": 95.0}
