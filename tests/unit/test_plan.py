"""The plan says what a recipe means; the lock keeps two runs out of one folder."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.config import load_recipe
from cluster.modelfiles import count_parameters, read_pipeline
from cluster.plan import preflight, resolve
from cluster.runlock import LOCK_FILE, STALE_AFTER_S, RunLock, read_holder
from raysteer.errors import ConfigError, StorageError
from tests.conftest import RecipeFactory
from tests.tiny_flow import tiny_flux


def test_batch_arithmetic_is_spelt_out(tiny_recipe: RecipeFactory) -> None:
    changes = {
        "run.groups_per_step": 6,
        "run.steps": 10,
        "sampling.group_size": 8,
        "sampling.steps": 10,
        "sampling.trained.count": 4,
        "learner.workers": 2,
        "objective": {"updates_per_batch": 2},
    }
    plan = resolve(load_recipe(tiny_recipe(changes)))
    assert plan.images_per_step == 48
    assert plan.unsafe_groups == 3
    assert plan.images_per_update_per_rank == 24
    assert plan.steps_per_update == 2
    assert plan.updates == 20
    assert plan.images == 480
    assert plan.forwards_per_step == 48 * 4 * 2
    text = plan.render()
    assert "6 prompts × 8 images each = 48 images (3 unsafe prompts, 3 safe)" in text
    assert "10 steps × 2 = 20 optimiser updates on 480 images" in text
    assert "proximal" not in text
    decoupled = load_recipe(tiny_recipe(changes | {"objective": {"updates_per_batch": 2, "anchor": "proximal"}}))
    assert "first as many without one (anchor proximal)" in resolve(decoupled).render()


def test_a_range_of_members_and_choosy_roles_show_in_the_plan(tiny_recipe: RecipeFactory) -> None:
    changes = {
        "samplers": {"min": 2, "max": 5, "num_cpus": 1, "labels": {"zone": "a"}},
        "learner": {"workers": 3, "min_workers": 2, "num_cpus": 1.0, "resources": {"rank": 1}},
        "run.groups_per_step": 4,
        "cluster": {"address": "10.0.0.5:6379"},
    }
    plan = resolve(load_recipe(tiny_recipe(changes)))
    text = plan.render()
    assert "2..5 × 1 CPU" in text and "2..3 × 1 CPU" in text
    assert "4.1 to 8.1 CPUs and 0 GPUs on the cluster at 10.0.0.5:6379; who goes where is printed on joining" in text
    assert "each of samplers takes 1 CPU on a node with zone=a" in text
    assert "each of learner takes 1 CPU + 1 rank" in text
    assert plan.images_per_update_per_rank == 4, "two of the four groups for the busiest rank"
    assert "3 learner workers (more when fewer are up, down to 2)" in text


def test_the_plan_says_which_noise_there_is_and_that_embedded_guidance_costs_nothing(
    tiny_recipe: RecipeFactory,
) -> None:
    unet = resolve(load_recipe(tiny_recipe({"sampling.mixed": True})))
    assert "eta 1," in unet.render()
    assert "the others deterministic" in unet.render()
    flux = {"model.path": str(tiny_flux()), "model.resolution": 32, "sampling.flow": {"kind": "cps", "level": 0.8}}
    flow = resolve(load_recipe(tiny_recipe(flux)))
    assert "noise cps 0.8," in flow.render()
    assert "deterministic" not in flow.render()
    assert unet.forwards_per_step == 2 * flow.forwards_per_step


def test_the_plan_counts_the_parameters_that_training_will_have(tiny_recipe: RecipeFactory) -> None:
    from diffusion.policy import DiffusionPolicy

    recipe = load_recipe(tiny_recipe())
    policy = DiffusionPolicy.load(recipe.model)
    trained = sum(parameter.numel() for parameter in policy.trainable_parameters())
    assert resolve(recipe).adapter_parameters == trained


def test_parameters_are_counted_from_file_headers(tiny_pipeline: Path, tiny_clip: Path) -> None:
    from diffusers import UNet2DConditionModel

    facts = read_pipeline(tiny_pipeline, rank=2, targets=["to_q"])
    unet = UNet2DConditionModel.from_pretrained(tiny_pipeline, subfolder="unet")
    assert facts.parameters["unet"] == sum(parameter.numel() for parameter in unet.parameters())
    assert facts.latent_shape == (4, 8, 8)
    assert facts.image_size == 32
    assert count_parameters(tiny_clip) > 100_000


def test_on_policy_recipes_expect_no_lag(tiny_recipe: RecipeFactory) -> None:
    assert resolve(load_recipe(tiny_recipe(), ["buffer.max_staleness=0"])).expected_lag.startswith("0:")


@pytest.fixture
def other_process() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def write_lock(folder: Path, pid: int, host: str, started: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK_FILE).write_text(json.dumps({"pid": pid, "host": host, "started": started}), encoding="utf-8")


def test_a_live_run_keeps_others_out(tmp_path: Path, other_process: subprocess.Popen[bytes]) -> None:
    write_lock(tmp_path, other_process.pid, socket.gethostname(), psutil.Process(other_process.pid).create_time())
    with pytest.raises(StorageError, match=f"process {other_process.pid}"):
        RunLock(tmp_path)
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == other_process.pid


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path, other_process: subprocess.Popen[bytes]) -> None:
    started = psutil.Process(other_process.pid).create_time()
    other_process.kill()
    other_process.wait()
    write_lock(tmp_path, other_process.pid, socket.gethostname(), started)
    with RunLock(tmp_path):
        holder = read_holder(tmp_path)
        assert holder is not None
        assert holder.is_me()
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_recycled_process_id_does_not_keep_a_lock_alive(tmp_path: Path) -> None:
    write_lock(tmp_path, os.getppid(), socket.gethostname(), psutil.Process(os.getppid()).create_time() - 1000)
    RunLock(tmp_path).release()


def test_a_run_on_another_machine_keeps_others_out_at_its_next_sign_of_life(tmp_path: Path) -> None:
    write_lock(tmp_path, 1, "another-host", 0.0)
    file = tmp_path / LOCK_FILE
    past = time.time() - 5
    os.utime(file, (past, past))
    alive = threading.Timer(0.2, os.utime, [file])
    alive.start()
    with pytest.raises(StorageError, match="another-host"):
        RunLock(tmp_path)
    alive.join()


def test_a_run_whose_machine_was_lost_is_waited_for_and_taken_over(tmp_path: Path) -> None:
    write_lock(tmp_path, 1, "another-host", 0.0)
    nearly = time.time() - STALE_AFTER_S + 1
    os.utime(tmp_path / LOCK_FILE, (nearly, nearly))
    with RunLock(tmp_path):
        holder = read_holder(tmp_path)
        assert holder is not None and holder.is_me()


def test_a_torn_lock_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text("{", encoding="utf-8")
    RunLock(tmp_path).release()


def test_preflight_of_a_good_recipe_holds_the_run(tiny_recipe: RecipeFactory) -> None:
    recipe = load_recipe(tiny_recipe())
    assert preflight(recipe, hold=False) is None
    assert not recipe.run_dir.exists()
    lock = preflight(recipe)
    assert lock is not None
    assert (recipe.run_dir / LOCK_FILE).exists()
    lock.release()


def test_an_offline_plan_says_where_its_images_come_from(tiny_recipe: RecipeFactory, tmp_path: Path) -> None:
    gdro = {"objective": {"name": "gdro"}, "run.steps": 6}
    rounds = load_recipe(tiny_recipe(gdro | {"offline": {"rounds": 3}, "generate": {"groups": 8}}))
    text = resolve(rounds).render()
    assert "3 × 2 steps, each on 8 groups of its own" in text and "without noise" in text and "samplers" in text
    text = resolve(load_recipe(tiny_recipe(gdro | {"offline": {"data": str(tmp_path)}}))).render()
    assert str(tmp_path) in text and "nothing is drawn" in text
    assert "samplers" not in text and "reward workers" not in text and "staleness" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offline": {"data": "x", "rounds": 2}}, r"offline.*rounds \(2\) generate their own groups"),
        ({"offline": {"rounds": 2}, "run.steps": 5}, r"run\.steps.*multiple of offline\.rounds \(2\); 4 would do"),
        ({"offline": {}, "objective": {"name": "grpo"}}, r"objective\.name.*final images.*use gdro"),
        (
            {
                "offline": {},
                "objective": {"name": "gdro", "std": "group"},
                "reward.mix": "group",
                "reward.terms": [{"name": "jpeg_compressibility"}],
            },
            r"reward\.mix.*learned by its totals: use sum",
        ),
        ({"offline": {}, "generate": {"groups": 1}}, r"generate\.groups.*run\.groups_per_step \(2\)"),
    ],
)
def test_an_impossible_offline_recipe_is_refused_by_its_key(
    tiny_recipe: RecipeFactory, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(tiny_recipe({"objective": {"name": "gdro"}} | changes))
