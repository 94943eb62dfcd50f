"""Loading a user's model: dtype by part, size, where the text encoders live, and what is refused in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import load_recipe
from cluster.modelfiles import read_pipeline
from cluster.plan import resolve
from cluster.preflight import check_model, check_schedule, pipeline_facts
from diffusion.conditioning import Conditioning
from diffusion.families.base import FAMILIES, Encoded
from diffusion.policy import DiffusionPolicy, LoRAConfig, ModelConfig
from diffusion.sampling import SamplingConfig, TrainedStepsConfig, generate, sample_rollout
from raysteer.errors import ConfigError, ModelError, UserError
from tests.tiny import tiny_pipeline
from tests.tiny_unet import tiny_sdxl

Recipes = Callable[..., Path]


def load(folder: Path | None = None, **model: Any) -> DiffusionPolicy:
    config = {"path": str(folder or tiny_pipeline()), "lora": LoRAConfig(rank=2), **model}
    return DiffusionPolicy.load(ModelConfig.model_validate(config))


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return shutil.copytree(tiny_pipeline(), tmp_path / "pipeline")


# ---- dtypes ------------------------------------------------------------------------------------------------


def test_each_part_has_its_own_dtype_and_latents_that_of_the_denoiser() -> None:
    policy = load(dtype="bfloat16", component_dtypes={"vae": "float32", "text_encoder": "float32"})
    pipe = policy.family.pipeline
    assert (pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert policy.dtype == torch.bfloat16
    assert policy.encode(["a house"])["embeds"].dtype == torch.float32
    cfg = SamplingConfig(steps=4, group_size=2, trained=TrainedStepsConfig(count=1))
    rollout = sample_rollout(policy, "a house", (1, 2), cfg, 0)
    assert rollout.trajectory.dtype == "bfloat16"
    assert rollout.images.shape == (2, 32, 32, 3)


def test_a_denoiser_in_another_dtype_stores_its_latents_in_it() -> None:
    policy = load(dtype="bfloat16", component_dtypes={"unet": "float32"})
    assert policy.dtype == policy.family.pipeline.unet.dtype == torch.float32
    assert policy.family.pipeline.vae.dtype == torch.bfloat16


# ---- text encoders -----------------------------------------------------------------------------------------


def test_offloaded_text_encoders_visit_the_device_once_per_prompt_and_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy, stays = load(offload_text_encoders=True), load()
    visits: list[torch.device] = []
    monkeypatch.setattr(policy.family, "text_to", visits.append)
    for _ in range(2):
        mine, theirs = policy.encode(["a house", ""]), stays.encode(["a house", ""])
        assert torch.equal(mine["embeds"], theirs["embeds"])
        assert len(visits) == 4  # there and back, for each of the two
    assert not policy.truncated("a house")
    assert len(visits) == 4
    assert {visit.type for visit in visits[1::2]} == {"cpu"}


def test_the_cache_of_prompts_is_bounded_and_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load()
    size = policy.encode(["a"])["embeds"].nbytes
    monkeypatch.setattr("diffusion.policy._CACHE_BYTES", 3 * size)
    fresh: list[str] = []
    encode = policy.family.encode

    def noted(prompt: str) -> Encoded:
        fresh.append(prompt)
        return encode(prompt)

    monkeypatch.setattr(policy.family, "encode", noted)
    for prompt in ("", "a house", "", "a tree", "", "a dog", "", "a house"):
        policy.encode([prompt])
    assert fresh == ["", "a house", "a tree", "a dog", "a house"]  # the empty prompt is used all the time
    assert len(policy.encode(["a", "an", "the", "of", "in"])) == 5  # a batch larger than the cache


def test_conditioning_is_expanded_and_joined_part_by_part() -> None:
    one = Conditioning({"embeds": torch.rand(1, 3, 4), "ids": torch.tensor([[1, 2]])})
    three = one.expand(3)
    assert (len(three), three["embeds"].shape, three["ids"].shape) == (3, (3, 3, 4), (3, 2))
    assert three["embeds"].data_ptr() == one["embeds"].data_ptr()
    both = Conditioning.cat([three, one])
    assert len(both) == 4
    assert torch.equal(both["embeds"][3], one["embeds"][0])
    half = one.to(torch.bfloat16)
    assert (half["embeds"].dtype, half["ids"].dtype) == (torch.bfloat16, torch.int64)
    with pytest.raises(ValueError, match="same first dimension"):
        Conditioning({"embeds": torch.rand(2, 3), "pooled": torch.rand(1, 3)})


# ---- size --------------------------------------------------------------------------------------------------


def test_the_plan_knows_the_size_of_what_will_be_drawn(tiny_recipe: Recipes) -> None:
    for folder, resolution in ((tiny_pipeline(), None), (tiny_pipeline(), 48), (tiny_sdxl(), 64)):
        recipe = load_recipe(tiny_recipe({"model.path": str(folder), "model.resolution": resolution}))
        check_model(recipe)
        check_schedule(recipe)
        facts = pipeline_facts(recipe)
        assert facts is not None
        policy = load(folder, resolution=resolution)
        assert facts.latent_shape == policy.latent_shape
        assert generate(policy, ["a"], [0], 1, 1.0).shape == (1, facts.image_size, facts.image_size, 3)


@pytest.mark.parametrize(("resolution", "nearest"), [(51, 52), (3, 4), (1, 4)])
def test_a_resolution_that_is_no_whole_number_of_latents_is_refused(
    tiny_recipe: Recipes, resolution: int, nearest: int
) -> None:
    message = rf"model\.resolution: {resolution} cannot be used; .* a multiple of 4 pixels: use {nearest}"
    with pytest.raises(ConfigError, match=message):
        load(resolution=resolution)
    with pytest.raises(ConfigError, match=message):
        check_model(load_recipe(tiny_recipe({"model.resolution": resolution})))


def test_the_plan_counts_each_part_in_its_dtype_and_none_that_is_away(tiny_recipe: Recipes) -> None:
    counts = read_pipeline(tiny_sdxl(), rank=4).parameters
    assert {"unet", "vae", "text_encoder", "text_encoder_2"} == counts.keys()

    def weights(**model: object) -> int | None:
        changes = {f"model.{key}": value for key, value in {"path": str(tiny_sdxl()), **model}.items()}
        return resolve(load_recipe(tiny_recipe(changes))).roles[0].parts["weights"]

    assert weights() == 4 * sum(counts.values())
    assert (
        weights(dtype="bfloat16", component_dtypes={"vae": "float32"}) == 2 * sum(counts.values()) + 2 * counts["vae"]
    )
    assert weights(offload_text_encoders=True) == 4 * (counts["unet"] + counts["vae"])


# ---- refusals, at loading and in the preflight alike --------------------------------------------------------


def refused(tiny_recipe: Recipes, folder: Path, message: str, **model: Any) -> None:
    """Loading and the preflight both refuse ``folder`` in one line that has ``message``."""
    changes = {f"model.{key}": value for key, value in {"path": str(folder), **model}.items()}
    for attempt in (lambda: load(folder, **model), lambda: check_model(load_recipe(tiny_recipe(changes)))):
        with pytest.raises(UserError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_an_unsupported_class_is_named_with_all_that_are_supported(copied: Path, tiny_recipe: Recipes) -> None:
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps(index | {"_class_name": "KandinskyPipeline"}))
    refused(tiny_recipe, copied, rf"KandinskyPipeline is not supported; use one of: {', '.join(FAMILIES)}")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(copied: Path, tiny_recipe: Recipes, part: str) -> None:
    shutil.rmtree(copied / part)
    refused(tiny_recipe, copied, f"its part {part} is missing; download or save the whole pipeline")


def test_parts_that_are_never_loaded_may_be_missing(copied: Path, tiny_recipe: Recipes) -> None:
    """Folders of SD 1.x name a safety checker, and many people delete it."""
    index = json.loads((copied / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (copied / "model_index.json").write_text(json.dumps(index))
    check_model(load_recipe(tiny_recipe({"model.path": str(copied)})))
    assert load(copied).family.pipeline.safety_checker is None


def test_a_variant_that_is_not_there_is_named_with_the_files_that_are(copied: Path, tiny_recipe: Recipes) -> None:
    refused(
        tiny_recipe,
        copied,
        r"model\.variant fp16: .*unet has no weights of this variant \(.*safetensors",
        variant="fp16",
    )


def test_a_variant_that_is_there_is_taken(copied: Path, tiny_recipe: Recipes) -> None:
    for file in copied.glob("*/*.safetensors"):
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    check_model(load_recipe(tiny_recipe({"model.path": str(copied), "model.variant": "fp16"})))
    ours, plain = load(copied, variant="fp16"), load()
    assert torch.equal(ours.encode(["a house"])["embeds"], plain.encode(["a house"])["embeds"])


def test_a_dtype_for_a_part_that_is_not_there_is_refused(tiny_recipe: Recipes) -> None:
    message = r"model\.component_dtypes: 'vea' cannot be used; this pipeline's parts are scheduler, text_encoder,"
    refused(tiny_recipe, tiny_pipeline(), message, component_dtypes={"vea": "float32"})


def test_every_target_must_match_something(tiny_recipe: Recipes) -> None:
    """One that does would otherwise hide a misspelt other."""
    lora = {"rank": 2, "targets": ["to_q", "too_k"]}
    refused(tiny_recipe, tiny_pipeline(), r"model\.lora\.targets.*too_k", lora=lora)


def test_a_target_that_is_no_layer_with_weights_is_refused() -> None:
    with pytest.raises(ModelError, match=r"model\.lora\.targets \['attn1'\] cannot be adapted"):
        load(lora={"rank": 2, "targets": ["attn1"]})


def test_a_config_that_says_too_little_is_named(copied: Path, tiny_recipe: Recipes) -> None:
    file = copied / "unet" / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "sample_size"}))
    with pytest.raises(ModelError, match="lacks 'sample_size'"):
        check_model(load_recipe(tiny_recipe({"model.path": str(copied)})))
