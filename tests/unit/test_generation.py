"""What ``raysteer generate`` checks, and what decides a dataset; nothing is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.config import load_recipe
from cluster.generate import batch_size, prepare
from diffusion.policy import DiffusionPolicy
from diffusion.sampling import Trajectory, generate, sample_deterministic
from raysteer.errors import CheckpointError, ConfigError, ExportError, ModelError, StorageError, UserError
from tests.conftest import RecipeFactory


@pytest.mark.parametrize(("groups", "usual", "expected"), [(256, 32, 32), (256, 48, 32), (250, 16, 10), (7, 4, 1)])
def test_batches_are_as_large_as_a_step_where_that_divides_the_groups(
    tiny_recipe: RecipeFactory, groups: int, usual: int, expected: int
) -> None:
    recipe = load_recipe(tiny_recipe({"generate.groups": groups, "run.groups_per_step": usual}))
    assert batch_size(recipe) == expected
    run = prepare(recipe).recipe.run
    assert run.steps * run.groups_per_step == groups


def test_a_dataset_may_grow_in_batches_of_its_own(tiny_recipe: RecipeFactory) -> None:
    def recipe(groups: int) -> Any:
        return load_recipe(tiny_recipe({"generate.groups": groups, "run.groups_per_step": 4}))

    first = prepare(recipe(12))
    first.folder.create()
    first.begin()
    first.keep(3, {"step": 3})
    grown = prepare(recipe(20))
    assert (grown.recipe.run.steps, grown.recipe.run.groups_per_step) == (5, 4)
    assert grown.progress() == (3, {"step": 3})
    with pytest.raises(ConfigError, match=r"generate.groups: 18 cannot be used; .*in batches of 4: 16 would do"):
        prepare(recipe(18))


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"run.seed": 8}, "run.seed was 7, is 8"),
        ({"sampling.group_size": 3}, "sampling.group_size was 2, is 3"),
        ({"generate.steps": 3}, "generate.steps was None, is 3"),
        ({"generate.guidance_scale": 1.0}, "generate.guidance_scale was None, is 1.0"),
        ({"reward.alpha": 0.5}, "reward.alpha was 1.0, is 0.5"),
        ({"prompts.unsafe_fraction": 0.25}, "prompts.unsafe_fraction was 0.5, is 0.25"),
        ({"model.dtype": "bfloat16"}, "model.dtype was 'float32', is 'bfloat16'"),
        ({"optimizer.lr": 1.0, "objective.clip_range": 0.5, "sampling.eta": 0.3, "model.lora.rank": 3}, None),
        ({"samplers.count": 3, "buffer.max_staleness": 2, "learner.workers": 2, "sampling.trained.count": 1}, None),
        ({"tracking.experiment": "other", "reward.detector": "tests.ray.faults:detector"}, None),
    ],
)
def test_what_decides_the_groups_may_not_change_and_the_rest_may(
    tiny_recipe: RecipeFactory, changes: dict[str, Any], refused: str | None
) -> None:
    settings = {"generate.groups": 4, "run.groups_per_step": 4}
    first = prepare(load_recipe(tiny_recipe(settings)))
    first.folder.create()
    first.begin()
    changed = load_recipe(tiny_recipe(settings | changes))
    if refused is None:
        prepare(changed)
        return
    with pytest.raises(CheckpointError, match=rf"come from another recipe \({refused}\); .*another run.name"):
        prepare(changed)


def test_a_changed_prompt_file_is_another_recipe(tiny_recipe: RecipeFactory, tmp_path: Path) -> None:
    recipe = load_recipe(tiny_recipe({"generate.groups": 4}))
    first = prepare(recipe)
    first.folder.create()
    first.begin()
    with open(tmp_path / "safe.txt", "a", encoding="utf-8") as file:
        file.write("a green house\n")
    with pytest.raises(CheckpointError, match=r"another recipe \(a file it names has changed\)"):
        prepare(recipe)


def test_a_folder_is_for_a_training_or_for_a_dataset(tiny_recipe: RecipeFactory) -> None:
    from cluster.preflight import preflight

    recipe = load_recipe(tiny_recipe())
    recipe.run_dir.mkdir(parents=True)
    (recipe.run_dir / "recipe.yaml").write_text(recipe.to_yaml())
    with pytest.raises(StorageError, match=r"it holds a training run; give this dataset another run.name"):
        prepare(recipe)
    other = load_recipe(tiny_recipe({"run.name": "data"}))
    generation = prepare(other)
    generation.folder.create()
    generation.begin()
    with pytest.raises(StorageError, match=r"dataset that raysteer generate made; give this run another run.name"):
        preflight(other)


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "generation.json: cannot be read"), ('{"format": 9}', "has format 9, this version reads 1")],
)
def test_a_damaged_record_is_named(tiny_recipe: RecipeFactory, text: str, said: str) -> None:
    recipe = load_recipe(tiny_recipe())
    recipe.run_dir.mkdir(parents=True)
    (recipe.run_dir / "generation.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        prepare(recipe)


def test_what_is_missing_is_said_before_anything_starts(tiny_recipe: RecipeFactory, tmp_path: Path) -> None:
    def failing(changes: dict[str, Any], adapter: str | None = None) -> UserError:
        with pytest.raises(UserError) as caught:
            prepare(load_recipe(tiny_recipe(changes)), adapter)
        return caught.value

    assert isinstance(failing({}, str(tmp_path / "none")), ExportError)
    assert isinstance(failing({"model.path": str(tmp_path / "none")}), ModelError)
    assert "generate.groups" in str(failing({"generate.groups": 0}))
    assert "generate.steps" in str(failing({"generate.steps": 5000}))


def test_an_adapter_of_another_model_is_refused(tiny_recipe: RecipeFactory, tmp_path: Path) -> None:
    from diffusion.adapters import save_adapter

    recipe = load_recipe(tiny_recipe())
    state = DiffusionPolicy.load(recipe.model).adapter_state()
    wide = {n: np.concatenate([v, v], 0) if n.endswith("lora_B.weight") else v for n, v in state.items()}
    save_adapter(wide, tmp_path / "wide")
    with pytest.raises(ModelError, match="use the model it was made for"):
        prepare(recipe, str(tmp_path / "wide"))
    save_adapter(state, tmp_path / "fits")
    assert prepare(recipe, str(tmp_path / "fits")).checksum != prepare(recipe).checksum


# -- drawing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_deterministic_group_is_what_the_pipeline_draws_and_has_no_trained_steps(
    tiny_recipe: RecipeFactory, dtype: str
) -> None:
    recipe = load_recipe(tiny_recipe({"model.dtype": dtype}))
    policy = DiffusionPolicy.load(recipe.model)
    rollout = sample_deterministic(policy, "a red circle", [5, 6, 7], 4, 2.0)
    trajectory = rollout.trajectory
    np.testing.assert_array_equal(rollout.images, generate(policy, ["a red circle"] * 3, [5, 6, 7], 4, 2.0))
    assert (trajectory.group_size, trajectory.num_positions, trajectory.dtype) == (3, 0, dtype)
    assert trajectory.x_t.shape == trajectory.x_prev.shape == (3, 0, *policy.latent_shape)
    assert trajectory.log_prob.shape == (3, 0) and trajectory.step_index.dtype == np.int64
    assert trajectory.latents().shape == (3, *policy.latent_shape)
    np.testing.assert_array_equal(policy.decode(trajectory.latents()), rollout.images)


def test_a_trajectory_of_latents_gives_them_back() -> None:
    given = np.random.default_rng(0).standard_normal((3, 4, 5, 6)).astype(np.float32)
    trajectory = Trajectory.of_latents("a prompt", given)
    assert (trajectory.prompt, trajectory.dtype, trajectory.num_positions) == ("a prompt", "float32", 0)
    assert torch.equal(trajectory.latents(), torch.from_numpy(given))
    given[:] = 0
    assert trajectory.latents().abs().sum() > 0, "a copy"


def test_the_commands_import_nothing_heavy() -> None:
    code = "import sys; import cluster.journal, learner.dataset; print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"
