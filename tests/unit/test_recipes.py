"""The shipped recipes: they load, say what they need, and have the published values they claim."""

from pathlib import Path
from typing import Any

import pytest

from cluster.config import Recipe, load_recipe, trained_count
from cluster.recipe_yaml import known_keys
from learner.gdro import GDROConfig

FOLDER = Path(__file__).parents[2] / "recipes"
FILES = sorted(FOLDER.glob("*.yaml"))
MODELS = [file for file in FILES if not file.name.startswith("glyphs")]  # those whose weights are not shipped

# arXiv 2605.18719, 2507.21802, 2505.05470, 2505.07818, and the code released with them
PUBLISHED: dict[str, dict[str, Any]] = {
    "sd15-safediffusion-r1": {
        "run.steps": 300,
        "run.seed": 42,
        "run.groups_per_step": 32,
        "run.checkpoint_every": 20,
        "sampling.steps": 50,
        "sampling.eta": 1.0,
        "sampling.guidance_scale": 5.0,
        "sampling.group_size": 16,
        "sampling.trained.mode": "all",
        "sampling.trained.last": 49,
        "reward.name": "steering",
        "reward.alpha": 0.5,
        "reward.mode": "translate",
        "reward.steer": "all",
        "reward.anchors": "compact",
        "reward.clip.model": "ViT-H-14",
        "objective.clip_range": 1e-4,
        "objective.adv_clip": 2.5,
        "objective.std": "group",
        "objective.kl_coef": 0.0,
        "objective.train_guidance": "both",
        "optimizer.weight_decay": 1e-4,
        "optimizer.eps": 1e-8,
        "optimizer.max_grad_norm": 1.0,
        "optimizer.warmup_steps": 0,
    },
    "sdxl-safediffusion-r1": {
        "reward.name": "steering",
        "reward.alpha": 0.5,
        "reward.clip.model": "ViT-H-14",
        "sampling.eta": 1.0,
        "sampling.guidance_scale": 5.0,
        "sampling.group_size": 16,
        "objective.clip_range": 1e-4,
        "objective.adv_clip": 2.5,
    },
    "sd35-grpo": {
        "model.use_t5": False,
        "model.lora.rank": 32,
        "model.lora.alpha": 64.0,
        "sampling.steps": 10,
        "sampling.flow.kind": "sde",
        "sampling.flow.level": 0.7,
        "sampling.guidance_scale": 4.5,
        "sampling.group_size": 24,
        "sampling.mixed": True,
        "sampling.trained.mode": "sliding",
        "sampling.trained.every": 25,
        "sampling.trained.stride": 1,
        "run.groups_per_step": 48,
        "objective.clip_range": 1e-4,
        "objective.adv_clip": 5.0,
        "objective.updates_per_batch": 2,
        "optimizer.lr": 3e-4,
    },
    "flux-grpo": {
        "model.dtype": "bfloat16",
        "model.gradient_checkpointing": True,
        "model.offload_text_encoders": True,
        "sampling.steps": 16,
        "sampling.flow.kind": "constant",
        "sampling.flow.level": 0.3,
        "sampling.shift": 3.0,
        "sampling.guidance_scale": 3.5,
        "sampling.group_size": 12,
        "sampling.same_initial_noise": True,
        "sampling.mixed": True,
        "sampling.trained.mode": "sliding",
        "sampling.trained.count": 4,
        "sampling.trained.last": 15,
        "objective.clip_range": 1e-4,
        "objective.adv_clip": 5.0,
        "objective.std": "group",
        "objective.kl_coef": 0.0,
        "optimizer.max_grad_norm": 1.0,
        "optimizer.ema_decay": 0.995,
    },
}


def header(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_shipped_recipe_loads(file: Path) -> None:
    recipe = load_recipe(file)
    assert set(recipe.flat()) <= set(known_keys(Recipe))
    assert recipe.run.name.startswith(file.stem)
    assert f"recipes/{file.name}" in header(file)


def test_every_shipped_recipe_is_in_the_table() -> None:
    table = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert {file.name for file in FILES} == {
        line.split("`")[1] for line in table.splitlines() if line.startswith("| `") and ".yaml`" in line
    }


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name, values in PUBLISHED.items() for key in values], ids=lambda part: part
)
def test_a_published_value_is_as_published(name: str, key: str) -> None:
    value: Any = load_recipe(FOLDER / f"{name}.yaml")
    for part in key.split("."):
        value = getattr(value, part)
    assert value == PUBLISHED[name][key]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_trained_steps_are_shared_out_evenly_over_the_updates(file: Path) -> None:
    recipe = load_recipe(file)
    if isinstance(recipe.objective, GDROConfig):
        assert recipe.objective.draws % recipe.objective.updates_per_batch == 0
        return
    count, last = trained_count(recipe), recipe.sampling.trained.last
    assert last is not None and last < recipe.sampling.steps  # the last step has hardly any noise
    assert 1 <= count <= last - recipe.sampling.trained.first
    assert count % recipe.objective.updates_per_batch == 0
    assert recipe.run.groups_per_step % recipe.learner.workers == 0
    for _, term in recipe.reward.located():
        seen = term.pickscore if term.name == "pickscore" else term.clip
        assert seen is not None and seen.batch_size == recipe.sampling.group_size
    if recipe.sampling.trained.mode == "sliding":  # whole turns, so that every step is trained as often as any other
        eligible = last - recipe.sampling.trained.first
        assert recipe.run.steps >= recipe.sampling.trained.every * (eligible - count + 1)


@pytest.mark.parametrize("file", MODELS, ids=lambda file: file.stem)
def test_the_header_names_how_to_get_every_weight(file: Path) -> None:
    recipe, said = load_recipe(file), header(file)
    assert f"hf download {recipe.model.path} " in said
    for _, term in recipe.reward.located():
        if term.clip is not None and term.name != "pickscore":
            assert term.clip.pretrained is not None
            assert f"{Path(term.clip.pretrained).name} --local-dir weights" in said
        if term.pickscore is not None:
            assert Path(term.pickscore.model).name in said


def test_the_glyph_recipes_differ_in_the_model_alone_so_that_their_runs_can_be_compared() -> None:
    unet, flow = (load_recipe(FOLDER / f"{name}.yaml") for name in ("glyphs", "glyphs-flow"))
    for section in ("reward", "objective", "optimizer", "prompts", "buffer", "evaluation"):
        assert getattr(unet, section) == getattr(flow, section), section
    assert unet.run.model_copy(update={"name": flow.run.name}) == flow.run
    changed = {"flow", "mixed"}
    assert unet.sampling.model_dump(exclude=changed) == flow.sampling.model_dump(exclude=changed)


def test_offline_and_online_start_from_the_same_model_prompts_and_reward() -> None:
    online, offline = (load_recipe(FOLDER / f"glyphs-{name}.yaml") for name in ("flow", "gdro"))
    for section in ("model", "reward", "prompts", "samplers", "reward_workers", "learner", "evaluation"):
        assert getattr(online, section) == getattr(offline, section), section
    assert (online.run.seed, online.run.groups_per_step) == (offline.run.seed, offline.run.groups_per_step)
    for key in ("steps", "guidance_scale", "group_size"):
        assert getattr(online.sampling, key) == getattr(offline.sampling, key), key


def test_one_gpu_is_enough_for_the_recipe_that_says_so() -> None:
    recipe = load_recipe(FOLDER / "sd15-one-gpu.yaml")
    shares = [(role.num_gpus, getattr(role, "count", 1)) for role in (recipe.samplers, recipe.reward_workers)]
    assert 0.0 < sum(share * count for share, count in shares) + recipe.learner.num_gpus <= 1.0
    assert min(share for share, _ in shares) > 0.0 < recipe.learner.num_gpus


def test_sixteen_gigabytes_are_enough_by_the_printed_estimate() -> None:
    from cluster.memory import fullest_gpu, role_memory
    from cluster.modelfiles import known_pipeline

    recipe = load_recipe(FOLDER / "sd15-one-gpu.yaml")
    model = recipe.model
    load = fullest_gpu(role_memory(recipe, known_pipeline(model.path, model.lora.rank, model.lora.targets, None)))
    assert load is not None and set(load.processes.values()) == {1} and len(load.processes) == 3
    assert load.total is not None and load.total < 0.9 * 16e9  # the estimate asks for a tenth left free
