"""The memory estimate: right about real modules, and about who meets on a GPU."""

from typing import Any

import pytest
import torch

from benchmarks.memory import count
from cluster.config import load_recipe
from cluster.known_models import KNOWN, KnownModel
from cluster.memory import RoleMemory, fullest_gpu, main_memory, role_memory
from cluster.modelfiles import known_pipeline
from cluster.preflight import pipeline_facts
from diffusion.families.base import family_for
from tests.conftest import RecipeFactory

TWO_LEVELS = {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}


def small(known: KnownModel) -> dict[str, Any]:
    """A published denoiser of the same make, a fraction as wide and deep."""
    component = "unet" if "unet" in known.configs else "transformer"
    config = dict(known.configs[component])
    if component == "unet":
        return config | {"block_out_channels": [64, 128], "cross_attention_dim": 64, "layers_per_block": 1} | TWO_LEVELS
    depth = {"num_layers": 4, "num_attention_heads": 4, "joint_attention_dim": 64, "pooled_projection_dim": 32}
    if config["_class_name"] == "SD3Transformer2DModel":
        return (
            config | depth | {"caption_projection_dim": 256, "dual_attention_layers": [0, 1], "pos_embed_max_size": 32}
        )
    return config | depth | {"num_single_layers": 4}


@pytest.mark.parametrize(
    "name", ["stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-3.5-medium"]
)
def test_the_formula_is_near_what_lives_and_errs_upwards(name: str) -> None:
    family = family_for(KNOWN[name].pipeline)
    assert family is not None
    config = small(KNOWN[name])
    found = count(config, family.default_targets, (config["in_channels"], 32, 32), "float32", real=True)
    for what in ("inference", "training", "checkpointed"):
        assert 0.9 < getattr(found.formula, what) / getattr(found.counted, what) < 1.35, what


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_what_is_known_of_a_model_follows_from_its_configuration(name: str) -> None:
    import diffusers

    known = KNOWN[name]
    family: Any = family_for(known.pipeline)
    config = known.configs[family.component]
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if not k.startswith("_")}
    with torch.device("meta"):
        denoiser = getattr(diffusers, config["_class_name"])(**given)
    assert sum(t.numel() for t in denoiser.state_dict().values()) == known.parameters[family.component]
    adapted = [m for n, m in denoiser.named_modules() if n.endswith(tuple("." + t for t in family.default_targets))]
    assert sum(m.in_features + m.out_features for m in adapted) == known.adapter_per_rank


def role(name: str, count: int, gpus: float, size: int | None) -> RoleMemory:
    return RoleMemory(name, count, 1.0, gpus, {"weights": size})


def test_roles_meet_on_a_gpu_as_long_as_their_shares_fit() -> None:
    shared = fullest_gpu([role("samplers", 1, 0.4, 4), role("reward workers", 1, 0.2, 2), role("learner", 1, 0.4, 7)])
    assert shared is not None and shared.total == 13
    apart = fullest_gpu([role("samplers", 5, 1.0, 4), role("reward workers", 1, 1.0, 2), role("learner", 2, 1.0, 7)])
    assert apart is not None and (apart.total, apart.processes) == (7, {"learner": 1})
    packed = fullest_gpu([role("samplers", 8, 0.25, 3), role("learner", 1, 0.5, 5)])
    assert packed is not None and packed.total == 12
    assert fullest_gpu([role("samplers", 1, 0.0, 4)]) is None
    unknown = fullest_gpu([role("samplers", 1, 0.5, None)])
    assert unknown is not None and unknown.total is None


def test_memory_is_counted_for_as_many_members_as_there_may_be(tiny_recipe: RecipeFactory) -> None:
    def bytes_of(samplers: dict[str, int]) -> int:
        recipe = load_recipe(tiny_recipe({"samplers": samplers}))
        total = main_memory(role_memory(recipe, pipeline_facts(recipe)))
        assert total is not None
        return total

    assert bytes_of({"count": 1}) < bytes_of({"count": 4}) == bytes_of({"min": 1, "max": 4})


def test_what_costs_memory_shows_in_the_estimate(tiny_recipe: RecipeFactory) -> None:
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"

    def learner(*overrides: str) -> int:
        recipe = load_recipe(tiny_recipe(), [f"model.path={name}", "model.dtype=bfloat16", *overrides])
        total = role_memory(recipe, known_pipeline(name, recipe.model.lora.rank, None, None))[2].total
        assert total is not None
        return total

    usual = learner()
    assert learner("model.dtype=float32") > usual
    assert learner("sampling.group_size=4") > usual
    assert learner("objective.kl_coef=0.1") > usual
    assert learner("optimizer.ema_decay=0.9") > usual
    assert learner("model.gradient_checkpointing=true") < usual
    assert learner("objective.train_guidance=conditional") < usual
    assert learner("sampling.guidance_scale=1") < usual
