"""SD 1.x, SD 2.x and SDXL: what our policy computes is what the diffusers pipeline itself computes."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline

from diffusion.conditioning import Conditioning
from diffusion.policy import DiffusionPolicy, LoRAConfig, ModelConfig
from diffusion.sampling import SamplingConfig, generate
from diffusion.steps import DDIMEta
from raysteer.errors import ModelError
from tests.tiny import tiny_pipeline
from tests.tiny_unet import build_tiny_sdxl, tiny_sd2, tiny_sdxl

PROMPTS = ["a red circle", "a toxic sign in the house"]
MODELS: dict[str, Callable[[], Path]] = {
    "sd1": tiny_pipeline,
    "sd2": tiny_sd2,
    "sdxl": tiny_sdxl,
    "sdxl_encoded_empty_prompt": lambda: tiny_sdxl(False),
}
every_model = pytest.mark.parametrize("name", MODELS)


def load(folder: Path, **model: Any) -> DiffusionPolicy:
    config = {"path": str(folder), "lora": LoRAConfig(rank=2), **model}
    return DiffusionPolicy.load(ModelConfig.model_validate(config))


@functools.cache
def policy_of(name: str) -> DiffusionPolicy:
    return load(MODELS[name]())


@functools.cache
def plain(name: str) -> Any:
    """The pipeline as a user of diffusers has it, with DDIM."""
    pipe = DiffusionPipeline.from_pretrained(MODELS[name]())
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def start(policy: DiffusionPolicy, n: int = 2) -> torch.Tensor:
    seeds = range(3, 3 + n)
    return torch.stack([torch.randn(policy.latent_shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


@torch.no_grad()
def denoised(policy: DiffusionPolicy, steps: int, guidance: float) -> torch.Tensor:
    """Final latents of ``PROMPTS`` without noise between the steps."""
    stepper = policy.stepper(SamplingConfig(steps=steps), deterministic=True)
    x, cond = start(policy), policy.encode(PROMPTS)
    for i in range(stepper.num_steps):
        x = stepper.step(policy.predict(x, stepper.timesteps[i], cond, guidance), x, i, None, torch.float32).x_prev
    return x


@every_model
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_latents_are_those_of_the_plain_pipeline(name: str, guidance: float) -> None:
    policy = policy_of(name)
    theirs = plain(name)(
        PROMPTS, latents=start(policy), num_inference_steps=5, guidance_scale=guidance, eta=0.0, output_type="latent"
    ).images
    torch.testing.assert_close(denoised(policy, 5, guidance), theirs, rtol=1e-4, atol=1e-4)


@every_model
def test_the_images_are_those_of_the_plain_pipeline(name: str) -> None:
    policy = policy_of(name)
    ours = generate(policy, PROMPTS, [3, 4], steps=5, guidance_scale=4.0)
    theirs = plain(name)(
        PROMPTS, latents=start(policy), num_inference_steps=5, guidance_scale=4.0, eta=0.0, output_type="np"
    ).images
    assert np.abs(ours.astype(int) - (theirs * 255).round().astype(int)).max() <= 1


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_another_resolution_is_drawn_as_the_plain_pipeline_draws_it(name: str) -> None:
    """For SDXL that covers the time ids too: they say the size of the image."""
    policy = load(MODELS[name](), resolution=48)
    assert policy.latent_shape == (4, 12, 12)
    theirs = plain(name)(
        PROMPTS, latents=start(policy), height=48, width=48, num_inference_steps=4, guidance_scale=4.0, eta=0.0,
        output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(denoised(policy, 4, 4.0), theirs, rtol=1e-4, atol=1e-4)
    assert generate(policy, PROMPTS[:1], [3], 2, 1.0).shape == (1, 48, 48, 3)


@torch.no_grad()
def test_the_time_ids_and_the_pooled_embedding_matter() -> None:
    """The must-fail twin: with the size of another image, or no pooled embedding, the prediction is another."""
    policy = policy_of("sdxl")
    x, cond = start(policy), policy.encode(PROMPTS)
    right = policy.predict(x, 501, cond, 1.0)
    for part, factor in (("time_ids", 2.0), ("pooled", 0.0)):
        other = Conditioning({**cond.parts, part: factor * cond[part]})
        assert (policy.predict(x, 501, other, 1.0) - right).abs().max() > 1e-4, part


def test_sd2_is_stepped_by_its_velocity() -> None:
    """The must-fail twin: the same output read as noise leads elsewhere."""
    policy = policy_of("sd2")
    config = dict(policy.family.pipeline.scheduler.config)
    assert config["prediction_type"] == "v_prediction"
    x, out = start(policy), start(policy).flip(0)
    right = policy.stepper(SamplingConfig(steps=5), deterministic=True).mean(out, x, 2)
    wrong = DDIMEta.from_scheduler(config | {"prediction_type": "epsilon"}, 5, 0.0).mean(out, x, 2)
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(5)
    theirs = scheduler.step(out, scheduler.timesteps[2], x, eta=0.0).prev_sample
    torch.testing.assert_close(right, theirs, rtol=1e-5, atol=1e-5)
    assert (wrong - theirs).abs().max() > 0.1


# ---- conditioning ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdxl", "sdxl_encoded_empty_prompt"])
def test_sdxl_is_conditioned_as_by_its_pipeline(name: str) -> None:
    embeds, empty_embeds, pooled, empty_pooled = plain(name).encode_prompt(PROMPTS[1])
    ours, empty = policy_of(name).encode(PROMPTS[1:]), policy_of(name).encode([""])
    for mine, theirs in (
        (ours["embeds"], embeds),
        (ours["pooled"], pooled),
        (empty["embeds"], empty_embeds),
        (empty["pooled"], empty_pooled),
    ):
        assert torch.equal(mine, theirs)
    assert bool(empty["embeds"].any()) == (name != "sdxl")


@every_model
def test_a_prompt_is_truncated_when_its_tokens_do_not_fit(name: str) -> None:
    policy = policy_of(name)
    fits = " ".join(["circle"] * 14)  # begin and end are the other two of the tokenizer's 16
    assert not policy.truncated(fits)
    assert policy.truncated(fits + " circle")
    first, longer = policy.encode([fits + " circle", fits + " circle circle"])["embeds"]
    assert torch.equal(first, longer)


def test_every_family_says_what_it_adapts_and_adapts_it() -> None:
    for name in MODELS:
        policy = policy_of(name)
        adapted = {key.rsplit(".lora_", 1)[0] for key, _ in policy.named_trainable_parameters()}
        for target in policy.family.default_targets:
            assert any(key.endswith(f".{target}") for key in adapted), (name, target)


# ---- the autoencoder ---------------------------------------------------------------------------------------


def test_an_autoencoder_that_overflows_in_half_precision_stays_in_float32() -> None:
    """To the bit: it is not loaded in half precision first and widened afterwards."""
    vae = load(tiny_sdxl(), dtype="bfloat16").family.pipeline.vae
    assert vae.dtype == torch.float32
    saved = AutoencoderKL.from_pretrained(tiny_sdxl(), subfolder="vae")
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), saved.parameters(), strict=True))
    named = load(tiny_sdxl(), dtype="bfloat16", component_dtypes={"vae": "bfloat16"})
    assert named.family.pipeline.vae.dtype == torch.bfloat16
    assert generate(named, PROMPTS[:1], [1], 2, 3.0).shape == (1, 32, 32, 3)


def test_latents_are_unscaled_by_the_mean_and_deviation_the_autoencoder_names(tmp_path: Path) -> None:
    policy = load(build_tiny_sdxl(tmp_path / "pipeline"))
    vae, x = policy.family.pipeline.vae, start(policy)
    plainly = policy.family.decode(x)
    vae.register_to_config(latents_mean=[0.5, 0.0, -0.5, 1.0], latents_std=[2.0, 1.0, 0.5, 1.0])
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        expected = vae.decode(x * std / vae.config.scaling_factor + mean).sample
        assert torch.equal(policy.family.decode(x), expected)
    assert not torch.equal(expected, plainly)


# ---- what a user can get wrong -----------------------------------------------------------------------------


def test_an_unet_that_takes_more_than_latents_is_refused() -> None:
    from diffusion.families.stable_diffusion import StableDiffusion

    configs = {"unet": {"in_channels": 9, "out_channels": 4, "sample_size": 64}, "vae": {}}
    with pytest.raises(ModelError, match="takes 9 channels and gives 4; use a text-to-image model"):
        StableDiffusion.native_latent_shape(configs, None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "EDMDPMSolverMultistepScheduler has no beta schedule"),
        ({"_class_name": "DDIMScheduler"}, "clip_sample is on"),  # the default of its class
    ],
)
def test_a_schedule_without_densities_is_refused(config: dict[str, Any], message: str) -> None:
    from diffusion.families.sdxl import StableDiffusionXL

    with pytest.raises(ModelError, match=message):
        StableDiffusionXL.schedule(config, SamplingConfig(), (4, 8, 8))
