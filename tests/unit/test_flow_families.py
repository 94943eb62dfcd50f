"""Stable Diffusion 3 and FLUX.1 as families: without noise they draw exactly what their diffusers pipelines draw."""

import functools
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, StableDiffusion3Pipeline

from diffusion.families.flux import Flux, pack, unpack
from diffusion.families.sd3 import StableDiffusion3
from diffusion.flow_steps import FlowCPS, FlowNoiseConfig
from diffusion.policy import DiffusionPolicy, ModelConfig
from diffusion.sampling import SamplingConfig, generate
from raysteer.errors import ConfigError, ModelError
from tests.policies import load
from tests.tiny_flow import RESOLUTION, tiny_flux, tiny_sd3

PROMPTS = ["a toxic sign", "a red circle"]


class Case(NamedTuple):
    """A model, as a policy loads it and as a user of plain diffusers calls it."""

    folder: Path
    pipeline: Any
    guidance: float
    model: dict[str, Any]
    call: dict[str, Any]


@functools.cache
def case(name: str) -> Case:
    size = {"height": RESOLUTION, "width": RESOLUTION}
    at = {"resolution": RESOLUTION}
    if name.startswith("sd3-without-t5"):
        absent = {"text_encoder_3": None, "tokenizer_3": None}
        pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3(with_t5=False), **absent)
        model, call = ({"t5_tokens": 1}, {"max_sequence_length": 1}) if name.endswith("one-zero") else ({}, {})
        return Case(tiny_sd3(with_t5=False), pipeline, 4.5, {"use_t5": False, **model}, call)
    if name == "sd3-short-t5":
        pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3())
        return Case(tiny_sd3(), pipeline, 4.5, {"t5_tokens": 8}, {"max_sequence_length": 8})
    if name.startswith("sd3"):
        pipeline = StableDiffusion3Pipeline.from_pretrained(tiny_sd3())
        return Case(tiny_sd3(), pipeline, 1.0 if name == "sd3-plain" else 4.5, {}, {})
    if name == "flux-dev":
        return Case(tiny_flux(), FluxPipeline.from_pretrained(tiny_flux()), 3.5, at, size)
    pipeline = FluxPipeline.from_pretrained(tiny_flux(False))
    return Case(tiny_flux(False), pipeline, 1.0, at, size | {"max_sequence_length": 256})


@functools.cache
def policy_of(name: str) -> DiffusionPolicy:
    return load(case(name).folder, **case(name).model)


EVERY = ["sd3", "sd3-plain", "sd3-short-t5", "sd3-without-t5", "sd3-without-t5-one-zero", "flux-dev", "flux-schnell"]
every_case = pytest.mark.parametrize("name", EVERY)


def seed_latents(policy: DiffusionPolicy, seeds: range) -> torch.Tensor:
    return torch.stack([torch.randn(policy.latent_shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


@torch.no_grad()
def euler(policy: DiffusionPolicy, guidance: float, x: torch.Tensor, steps: int) -> torch.Tensor:
    stepper = policy.stepper(SamplingConfig(steps=steps), deterministic=True)
    cond = policy.encode(PROMPTS)
    for i in range(stepper.num_steps):
        output = policy.predict(x, float(stepper.timesteps[i]), cond, guidance)
        x = stepper.step(output, x, i, None, policy.dtype).x_prev
    return x


@every_case
@pytest.mark.parametrize("steps", [4, 9])
def test_without_noise_the_latents_are_the_pipelines_own(name: str, steps: int) -> None:
    folder_case, policy = case(name), policy_of(name)
    x, flux = seed_latents(policy, range(2)), name.startswith("flux")
    theirs = folder_case.pipeline(
        PROMPTS,
        num_inference_steps=steps,
        guidance_scale=folder_case.guidance,
        latents=pack(x) if flux else x,
        output_type="latent",
        **folder_case.call,
    ).images
    theirs = unpack(theirs, *x.shape[2:]) if flux else theirs
    ours = euler(policy, folder_case.guidance, x, steps)
    assert (ours - theirs).abs().max() <= 1e-4
    assert (theirs - x).std() > 0.1  # the model did something
    other = euler(policy, folder_case.guidance + 1.0, x, steps)
    # guidance is an input of FLUX.1-dev, true guidance of SD3; and where there is none, 2 would be another prediction
    assert (other - theirs).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["sd3", "flux-dev"])
def test_decoded_images_are_the_pipelines_own(name: str) -> None:
    folder_case, policy = case(name), policy_of(name)
    x = seed_latents(policy, range(2))
    theirs = folder_case.pipeline(
        PROMPTS,
        num_inference_steps=4,
        guidance_scale=folder_case.guidance,
        latents=pack(x) if name == "flux-dev" else x,
        output_type="np",
        **folder_case.call,
    ).images
    ours = generate(policy, PROMPTS, range(2), 4, folder_case.guidance)
    assert ours.shape == (2, RESOLUTION, RESOLUTION, 3)
    assert np.abs(ours - theirs * 255).max() <= 0.51  # rounded to the nearest level
    assert ours.std() > 10


def test_the_schedule_is_the_one_the_pipeline_used() -> None:
    for name in ("sd3", "flux-dev", "flux-schnell"):
        folder_case, policy = case(name), policy_of(name)
        folder_case.pipeline("", num_inference_steps=5, output_type="latent", guidance_scale=1.0, **folder_case.call)
        stepper = policy.stepper(SamplingConfig(steps=5, guidance_scale=1.0))
        np.testing.assert_allclose(stepper.timesteps, folder_case.pipeline.scheduler.timesteps.numpy(), rtol=1e-6)
        assert stepper.timesteps.dtype == np.float32


def test_a_bigger_image_shifts_fluxs_times_to_more_noise() -> None:
    config = dict(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).config)
    sampling = SamplingConfig(steps=10)
    small, large = (Flux.schedule(config, sampling, (16, side, side)).timesteps for side in (64, 128))
    assert (large[1:] > small[1:]).all()
    static = SamplingConfig(steps=10, shift=3.0)
    small, large = (Flux.schedule(config, static, (16, side, side)).timesteps for side in (64, 128))
    assert np.array_equal(small, large)


@pytest.mark.parametrize("family", [StableDiffusion3, Flux])
def test_a_shift_of_the_recipe_and_the_kind_of_noise_reach_the_schedule(family: Any) -> None:
    config, shape = dict(FlowMatchEulerDiscreteScheduler(shift=3.0).config), (16, 64, 64)
    shifted = family.schedule(config, SamplingConfig(steps=10, shift=6.0), shape)
    own = family.schedule(dict(FlowMatchEulerDiscreteScheduler(shift=6.0).config), SamplingConfig(steps=10), shape)
    np.testing.assert_allclose(shifted.timesteps[1:-1], own.timesteps[1:-1], rtol=0.05)  # SD3's ends move a little
    assert (shifted.timesteps[1:] > family.schedule(config, SamplingConfig(steps=10), shape).timesteps[1:]).all()
    cps = SamplingConfig(steps=10, flow=FlowNoiseConfig(kind="cps", level=0.5))
    assert type(family.schedule(config, cps, shape)) is FlowCPS
    assert (family.schedule(config, cps, shape, deterministic=True).sigmas == 0.0).all()


# ---- conditioning ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_prompt_is_encoded_as_the_pipeline_encodes_it() -> None:
    embeds, _, pooled, _ = case("sd3").pipeline.encode_prompt("a red circle", None, None)
    cond = policy_of("sd3").encode(["a red circle"])
    assert torch.equal(cond["embeds"], embeds)
    assert torch.equal(cond["pooled"], pooled)
    assert cond["embeds"].shape == (1, 16 + 256, 32)  # CLIP's tokens, then T5's
    for name, tokens in (("flux-dev", 512), ("flux-schnell", 256)):
        embeds, pooled, _ = case(name).pipeline.encode_prompt("a red circle", max_sequence_length=tokens)
        cond = policy_of(name).encode(["a red circle"])
        assert torch.equal(cond["embeds"], embeds)
        assert torch.equal(cond["pooled"], pooled)


def test_without_t5_its_place_is_zeros_and_everything_else_is_the_same() -> None:
    with_t5, without = policy_of("sd3"), load(tiny_sd3(), use_t5=False)  # left out although the folder has it
    assert without.family.pipeline.text_encoder_3 is None
    a, b = (policy.encode(["a red circle"]) for policy in (with_t5, without))
    assert torch.equal(a["embeds"][:, :16], b["embeds"][:, :16])
    assert torch.equal(a["pooled"], b["pooled"])
    assert (b["embeds"][:, 16:] == 0).all()
    assert (a["embeds"][:, 16:] != 0).any()


def test_the_denoiser_sees_as_many_tokens_of_t5_as_the_recipe_says() -> None:
    full, short, one_zero = (policy_of(name) for name in ("sd3", "sd3-short-t5", "sd3-without-t5-one-zero"))
    tokens = [policy.encode(["a red circle"])["embeds"].shape[1] for policy in (full, short, one_zero)]
    assert tokens == [16 + 256, 16 + 8, 16 + 1]
    assert not full.truncated("circle " * 8)
    assert short.truncated("circle " * 8)  # and the token that ends the sentence
    assert not one_zero.truncated("circle " * 8)  # zeros cut nothing off


@pytest.mark.parametrize("name", ["sd3", "flux-dev"])
def test_a_prompt_too_long_for_any_tokenizer_counts_as_truncated(name: str) -> None:
    policy = policy_of(name)
    assert not policy.truncated("a red circle")
    assert policy.truncated("a red circle " * 10)  # CLIP takes 16 tokens here


@pytest.mark.parametrize("name", ["sd3", "flux-dev"])
def test_text_encoders_move_alone(name: str) -> None:
    family = load(case(name).folder, **case(name).model).family
    family.text_to(torch.device("meta"))
    moved = {
        part_name
        for part_name, part in family.pipeline.components.items()
        if isinstance(part, torch.nn.Module) and next(part.parameters()).is_meta
    }
    assert moved == {part for part in family.pipeline.components if part.startswith("text_encoder")}


# ---- latents -----------------------------------------------------------------------------------------------


def test_packing_is_that_of_the_pipeline_and_unpacking_its_inverse() -> None:
    x = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pack(x), FluxPipeline._pack_latents(x, 2, 4, 8, 12))
    assert torch.equal(unpack(pack(x), 8, 12), x)


def test_latents_have_the_size_the_model_was_made_for_or_that_of_the_recipe() -> None:
    vae = {"block_out_channels": (128, 256, 512, 512)}
    sd35 = {"in_channels": 16, "sample_size": 128, "patch_size": 2, "pos_embed_max_size": 192}
    flux = {"in_channels": 64, "patch_size": 1}
    assert StableDiffusion3.native_latent_shape({"transformer": sd35, "vae": vae}, None) == (16, 128, 128)
    assert StableDiffusion3.native_latent_shape({"transformer": sd35, "vae": vae}, 512) == (16, 64, 64)
    assert Flux.native_latent_shape({"transformer": flux, "vae": vae}, None) == (16, 128, 128)
    assert Flux.native_latent_shape({"transformer": flux, "vae": vae}, 512) == (16, 64, 64)
    for family, transformer in ((StableDiffusion3, sd35), (Flux, flux)):
        with pytest.raises(ConfigError, match=r"^model\.resolution: 520 .* multiple of 16 pixels"):
            family.native_latent_shape({"transformer": transformer, "vae": vae}, 520)
    with pytest.raises(ConfigError, match=r"^model\.resolution: 3200 .* at most 3072"):
        StableDiffusion3.native_latent_shape({"transformer": sd35, "vae": vae}, 3200)
    assert policy_of("sd3").latent_shape == policy_of("flux-dev").latent_shape == (4, 8, 8)


# ---- what a user gets wrong --------------------------------------------------------------------------------


def refused(folder: Path, **model: Any) -> str:
    with pytest.raises(ModelError) as caught:
        DiffusionPolicy.load(ModelConfig.model_validate({"path": str(folder), **model}))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_t5_ends_in_one_line_with_the_remedy(tmp_path: Path) -> None:
    message = refused(tiny_sd3(with_t5=False))
    assert message.startswith(str(tiny_sd3(with_t5=False)))
    assert message.endswith("was saved without its T5 (text_encoder_3); set model.use_t5=false")
    folder = shutil.copytree(tiny_sd3(), tmp_path / "partly-downloaded")
    shutil.rmtree(folder / "text_encoder_3")
    message = refused(folder)
    assert "its part text_encoder_3 is missing" in message
    assert message.endswith("or set model.use_t5=false")
    assert load(folder, use_t5=False).family.pipeline.text_encoder_3 is None


def test_t5_tokens_are_refused_where_the_family_does_not_take_them() -> None:
    path = {"path": str(tiny_flux()), "resolution": RESOLUTION}
    with pytest.raises(ConfigError, match=r"^model\.t5_tokens: 128 .*only Stable Diffusion 3.*FluxPipeline does not$"):
        DiffusionPolicy.load(ModelConfig.model_validate({**path, "t5_tokens": 128}))
    for tokens in (0, 513):  # the pipeline takes at most 512
        with pytest.raises(ValueError, match="t5_tokens"):
            ModelConfig.model_validate({**path, "t5_tokens": tokens})


def test_guidance_is_refused_where_the_model_knows_none() -> None:
    schnell, dev = policy_of("flux-schnell"), policy_of("flux-dev")
    with pytest.raises(ConfigError, match=r"^sampling\.guidance_scale: 3\.5 .*schnell.* use 1$"):
        schnell.stepper(SamplingConfig(steps=4, guidance_scale=3.5))
    assert schnell.stepper(SamplingConfig(steps=4, guidance_scale=1.0)).num_steps == 4
    assert dev.stepper(SamplingConfig(steps=4, guidance_scale=3.5)).num_steps == 4
    assert dev.family.embedded_guidance
    assert not schnell.family.embedded_guidance


def test_a_scheduler_option_we_do_not_reproduce_is_refused_by_name(tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sd3(with_t5=False), tmp_path / "karras")
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=True).save_pretrained(folder / "scheduler")
    with pytest.raises(ModelError, match=r"^scheduler: use_karras_sigmas is not supported"):
        load(folder, use_t5=False).stepper(SamplingConfig(steps=4))
