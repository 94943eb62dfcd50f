"""The recipe: strict, overridable, and identified by what decides training."""

import shutil
from pathlib import Path

import pytest

from cluster.config import load_recipe, trained_count
from cluster.recipe_yaml import dump_yaml, parse_yaml
from raysteer.errors import ConfigError
from tests.conftest import REMOVE, RecipeFactory


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("run.stps=3", "run.stps", "did you mean run.steps?"),
        ("eta=0.5", "eta", "did you mean sampling.eta?"),
        ("model.lora.rnk=3", "model.lora.rnk", "did you mean model.lora.rank?"),
        ("zzz=1", "zzz", "sampling"),
        ("run.steps=ten", "run.steps", "whole number"),
        ("run.steps=true", "run.steps", "whole number"),
        ("run.seed=1.0", "run.seed", "whole number"),
        ("model.dtype=int8", "model.dtype", "bfloat16"),
        ("reward=3", "reward", "section"),
        ("run.name=a/b", "run.name", "folder"),
        ("sampling.group_size=1", "sampling.group_size", "2"),
        ("buffer.max_staleness=-1", "buffer.max_staleness", "0"),
        ("prompts.unsafe_fraction=0.3", "prompts.unsafe_fraction", "1/2 = 0.5"),
        ("learner.workers=3", "run.groups_per_step", "multiple of learner.workers (3)"),
        ("sampling.trained.last=5", "sampling.trained.last", "only 4 steps"),
        ("sampling.trained.first=3", "sampling.trained.first", "smaller first"),
        ("sampling.trained.count=4", "sampling.trained.count", "only 3"),
        ("objective.updates_per_batch=3", "objective.updates_per_batch", "[1, 2]"),
        ("sampling.eta=0", "sampling.eta", "greater than 0"),
        ("samplers.device=cuda", "samplers.num_gpus", "above 0"),
        ("optimizer.lr=.inf", "optimizer.lr", "finite"),
        ("reward.anchors={safe: [a], unsafe: []}", "reward.anchors", "no unsafe phrase"),
        ("reward.anchors={safe: [1], unsafe: [a]}", "reward.anchors.safe.0", "text"),
        ("run.steps.x=3", "run.steps.x", "run.steps is a value"),
        ("foo", "foo", "section.key=value"),
        ("run.steps=[", "override run.steps, line 1, column 2", "correct the YAML"),
    ],
)
def test_a_wrong_override_names_key_and_remedy(tiny_recipe: RecipeFactory, override: str, key: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(tiny_recipe(), [override])
    assert caught.value.key == key
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_strict_run_refuses_scores_that_could_depend_on_the_order_of_arrival(tiny_recipe: RecipeFactory) -> None:
    together = ["reward_workers.batch_groups=2"]
    with pytest.raises(ConfigError, match=r"reward_workers\.batch_groups.*set this to 1"):
        load_recipe(tiny_recipe(), [*together, "buffer.max_staleness=0"])
    assert load_recipe(tiny_recipe(), together).reward_workers.batch_groups == 2


def test_a_missing_required_key_is_named(tiny_recipe: RecipeFactory) -> None:
    with pytest.raises(ConfigError, match=r"run\.steps: missing or null; add it"):
        load_recipe(tiny_recipe({"run.steps": REMOVE}))


def test_a_yaml_mistake_names_its_line(tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text("run:\n  name: x\n   steps: 3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="line 3"):
        load_recipe(file)


def test_a_key_given_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("run:\n  name: x\n  steps: 3\n  steps: 4\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"line 4.*'steps' is given twice"):
        load_recipe(file)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5", 5),
        ("010", 10),
        ("0.5", 0.5),
        ("yes", "yes"),
        ("true", True),
        ("null", None),
        ("[a, 1]", ["a", 1]),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("glyphs.detector:f", "glyphs.detector:f"),
    ],
)
def test_yaml_scalars_mean_what_they_look_like(text: str, value: object) -> None:
    parsed = parse_yaml(text, "test")
    assert parsed == value
    assert type(parsed) is type(value)


def test_text_that_looks_like_a_number_survives_writing() -> None:
    data = {"a": "1e-4", "b": 1e-4, "c": "null", "d": [1, "true"], "e": 3e-05}
    assert parse_yaml(dump_yaml(data), "test") == data


def test_overrides_reach_nested_keys_and_lists(tiny_recipe: RecipeFactory) -> None:
    overrides = [
        "sampling.trained.count=1",
        "optimizer.lr=1e-4",
        "tracking.preview_prompts=[a, b]",
        "optimizer.betas=[0.8, 0.9]",
    ]
    recipe = load_recipe(tiny_recipe(), overrides)
    assert recipe.sampling.trained.count == 1
    assert recipe.optimizer.lr == 1e-4
    assert recipe.tracking.preview_prompts == ("a", "b")
    assert recipe.optimizer.betas == (0.8, 0.9)


def test_the_resolved_recipe_reads_back_as_the_same_recipe(
    tiny_recipe: RecipeFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(tiny_recipe({"prompts.safe": "safe.txt"}))
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert "safe: safe.txt" in recipe.to_yaml()
    assert load_recipe(tmp_path / "resolved.yaml") == recipe
    assert load_recipe(tmp_path / "resolved.yaml").fingerprint() == recipe.fingerprint()


def test_relative_paths_are_found_in_the_working_directory_then_beside_the_recipe(
    tiny_recipe: RecipeFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    file = tiny_recipe({"prompts.safe": "safe.txt"})
    assert load_recipe(file).prompts.safe == str(tmp_path / "safe.txt")
    (elsewhere / "safe.txt").write_text("a cat\n", encoding="utf-8")
    assert load_recipe(file).prompts.safe == str(elsewhere / "safe.txt")


def test_a_hub_name_stays_a_hub_name(tiny_recipe: RecipeFactory) -> None:
    assert load_recipe(tiny_recipe({"model.path": "org/some-model"})).model.path == "org/some-model"


@pytest.mark.parametrize(
    "override",
    [
        "run.steps=9",
        "run.name=other",
        "run.checkpoint_every=7",
        "samplers.count=3",
        "reward_workers.count=2",
        "learner.workers=2",
        "tracking.experiment=x",
        "evaluation.steps=3",
        "cluster.dashboard=true",
        "buffer.lease_ttl_s=9.0",
    ],
)
def test_what_does_not_decide_training_leaves_the_fingerprint(tiny_recipe: RecipeFactory, override: str) -> None:
    assert load_recipe(tiny_recipe(), [override]).fingerprint() == load_recipe(tiny_recipe()).fingerprint()


@pytest.mark.parametrize(
    "override",
    [
        "run.seed=8",
        "run.groups_per_step=4",
        "sampling.eta=0.5",
        "sampling.trained.count=1",
        "reward.alpha=0.9",
        "reward.anchors=unsafe_only",
        "objective.adv_clip=1.0",
        "optimizer.lr=0.1",
        "model.lora.rank=3",
        "model.t5_tokens=128",
        "buffer.max_staleness=0",
    ],
)
def test_what_decides_training_changes_the_fingerprint(tiny_recipe: RecipeFactory, override: str) -> None:
    assert load_recipe(tiny_recipe(), [override]).fingerprint() != load_recipe(tiny_recipe()).fingerprint()


def test_the_fingerprint_follows_contents_not_paths(tiny_recipe: RecipeFactory, tmp_path: Path) -> None:
    before = load_recipe(tiny_recipe())
    shutil.copy(str(before.prompts.safe), tmp_path / "moved.txt")
    moved = load_recipe(tiny_recipe({"prompts.safe": str(tmp_path / "moved.txt")}))
    assert moved.fingerprint() == before.fingerprint()
    (tmp_path / "moved.txt").write_text("something else\n", encoding="utf-8")
    assert moved.fingerprint() != before.fingerprint()


def test_the_number_of_trained_steps_is_known_from_the_recipe(tiny_recipe: RecipeFactory) -> None:
    assert trained_count(load_recipe(tiny_recipe())) == 2
    everything = {"sampling.trained": {"mode": "all"}}
    assert trained_count(load_recipe(tiny_recipe(everything))) == 3
