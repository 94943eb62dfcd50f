"""The policy: guidance, embeddings, decoding, the adapter, and what a user sees when the model is not there."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from cluster.config import load_recipe
from cluster.preflight import check_schedule
from diffusion.adapters import checksum
from diffusion.policy import DiffusionPolicy, LoRAConfig, ModelConfig
from diffusion.sampling import SamplingConfig
from raysteer.errors import ModelError
from tests.tiny import tiny_pipeline

LORA = LoRAConfig(rank=4, alpha=8.0)


def load(adapter_seed: int = 0, **overrides: object) -> DiffusionPolicy:
    config = ModelConfig.model_validate({"path": str(tiny_pipeline()), "lora": LORA, **overrides})
    return DiffusionPolicy.load(config, adapter_seed=adapter_seed)


@pytest.fixture(scope="module")
def shared() -> DiffusionPolicy:
    return load()


@pytest.fixture
def policy(shared: DiffusionPolicy) -> Iterator[DiffusionPolicy]:
    """``load()``, whose adapter a test may move."""
    state = shared.adapter_state()
    yield shared
    shared.load_adapter(state)


def latents(n: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn((n, 4, 8, 8), generator=torch.Generator().manual_seed(seed))


def perturb(policy: DiffusionPolicy, scale: float = 0.05, seed: int = 0) -> DiffusionPolicy:
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.trainable_parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return policy


@torch.no_grad()
def test_a_new_adapter_changes_nothing_to_the_bit(policy: DiffusionPolicy) -> None:
    cond = policy.encode(["a red circle"] * 3)
    with_adapter = policy.predict(latents(), 501, cond, 5.0)
    with policy.adapter_disabled():
        reference = policy.predict(latents(), 501, cond, 5.0)
    assert torch.equal(with_adapter, reference)


@torch.no_grad()
def test_disabling_the_adapter_gives_the_base_model_and_enabling_gives_it_back(policy: DiffusionPolicy) -> None:
    cond = policy.encode(["a red circle"] * 3)
    base = policy.predict(latents(), 501, cond, 5.0)
    perturb(policy)
    trained = policy.predict(latents(), 501, cond, 5.0)
    with policy.adapter_disabled():
        assert torch.equal(policy.predict(latents(), 501, cond, 5.0), base)
        with policy.adapter_disabled():
            pass
        assert torch.equal(policy.predict(latents(), 501, cond, 5.0), base)  # the inner one did not enable it
    assert not torch.equal(trained, base)
    assert torch.equal(policy.predict(latents(), 501, cond, 5.0), trained)
    assert all(parameter.requires_grad for parameter in policy.trainable_parameters())


def test_the_adapter_is_a_function_of_its_seed() -> None:
    first, again, other = (checksum(load(seed).adapter_state()) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_adapter_is_trainable_and_it_is_float32(dtype: str) -> None:
    policy = load(dtype=dtype)
    trainable = policy.trainable_parameters()
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in trainable)
    everything = [
        p for part in ("unet", "vae", "text_encoder") for p in getattr(policy.family.pipeline, part).parameters()
    ]
    assert sum(p.requires_grad for p in everything) == len(trainable) > 0
    policy.predict(latents(), 501, policy.encode(["a"] * 3), 5.0).float().square().mean().backward()
    assert all(p.grad is None for p in everything if not p.requires_grad)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable)


@torch.no_grad()
def test_guidance_is_the_extrapolation_from_the_empty_prompt(policy: DiffusionPolicy) -> None:
    x, cond = latents(), policy.encode(["a red circle"] * 3)
    given = policy.predict(x, 501, cond, 1.0)
    uncond = policy.predict(x, 501, policy.encode([""] * 3), 1.0)
    torch.testing.assert_close(policy.predict(x, 501, cond, 4.0), uncond + 4.0 * (given - uncond), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(policy.predict(x, 501, cond, 0.0), uncond, rtol=1e-4, atol=1e-5)


def test_detaching_the_unconditional_half_changes_the_gradient_but_not_the_output(policy: DiffusionPolicy) -> None:
    perturb(policy)
    x, cond = latents(), policy.encode(["a red circle"] * 3)
    gradients = []
    outputs = []
    for detach in (False, True):
        output = policy.predict(x, 501, cond, 4.0, detach_uncond=detach)
        gradients.append(torch.autograd.grad(output.square().mean(), policy.trainable_parameters()))
        outputs.append(output.detach())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    assert any(not torch.allclose(a, b, rtol=1e-2) for a, b in zip(*gradients, strict=True))


def test_gradient_checkpointing_changes_neither_output_nor_gradient() -> None:
    results = []
    for checkpointing in (False, True):
        policy = perturb(load(gradient_checkpointing=checkpointing))
        output = policy.predict(latents(), 501, policy.encode(["a red circle"] * 3), 4.0)
        results.append((output.detach(), torch.autograd.grad(output.square().mean(), policy.trainable_parameters())))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_an_embedding_does_not_depend_on_its_batch_or_the_cache(policy: DiffusionPolicy) -> None:
    fresh = load()
    together = policy.encode(["a red circle", "a toxic sign", "a house"])
    assert torch.equal(fresh.encode(["a toxic sign"])["embeds"][0], together["embeds"][1])
    assert torch.equal(policy.encode(["a toxic sign"])["embeds"][0], together["embeds"][1])
    pipe = policy.family.pipeline
    theirs, _ = pipe.encode_prompt("a toxic sign", "cpu", 1, do_classifier_free_guidance=False)
    assert torch.equal(theirs[0], together["embeds"][1])


def test_images_are_rounded_to_the_nearest_level_not_truncated(policy: DiffusionPolicy) -> None:
    x = latents(4)
    with torch.no_grad():
        exact = (policy.family.decode(x) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255
    images = policy.decode(x)
    assert images.dtype == np.uint8
    assert images.shape == (4, 32, 32, 3)
    assert np.abs(images - exact).max() <= 0.5 + 1e-4
    assert (
        np.abs(exact.astype(np.uint8) - exact).max() > 0.9
    )  # the must-fail twin: truncation is off by up to one level


def test_adapter_state_goes_round_and_is_a_copy(policy: DiffusionPolicy) -> None:
    other = load(adapter_seed=7)
    state = perturb(policy).adapter_state()
    for array in state.values():
        array.setflags(write=False)  # as it comes out of the object store
    other.load_adapter(state)
    assert checksum(other.adapter_state()) == checksum(state)
    perturb(policy)
    assert checksum(policy.adapter_state()) != checksum(state)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoRAConfig(rank=4, alpha=4.0), r"alpha is 8, not 4; set model\.lora\.alpha"),
        (LoRAConfig(rank=2, alpha=8.0), r"has shape .*; set model\.lora\.rank"),
        (LoRAConfig(rank=4, alpha=8.0, targets=("to_q",)), r"is not part of this policy"),
    ],
)
def test_an_adapter_of_another_shape_or_alpha_is_refused(
    policy: DiffusionPolicy, lora: LoRAConfig, message: str
) -> None:
    state = policy.adapter_state()
    with pytest.raises(ModelError, match=message):
        load(lora=lora).load_adapter(state)


# ---- the schedule ------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline_with(tmp_path: Path) -> Callable[..., Path]:
    """Factory of copies of the tiny pipeline with a changed scheduler_config.json; a value of None removes the key."""

    def build(**changes: object) -> Path:
        folder = shutil.copytree(tiny_pipeline(), tmp_path / "pipeline")
        file = folder / "scheduler" / "scheduler_config.json"
        config = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
        return folder

    return build


@pytest.mark.parametrize(
    "changes",
    [
        {"clip_sample": True},
        {"clip_sample": None},  # the default of the class is on
        {"steps_offset": 0},
        {"steps_offset": None},
        {"clip_sample": True, "steps_offset": 0, "_class_name": "PNDMScheduler"},
    ],
)
def test_the_preflight_sees_the_schedule_that_the_pipeline_loads(
    pipeline_with: Callable[..., Path], tiny_recipe: Callable[..., Path], changes: dict[str, object]
) -> None:
    """StableDiffusionPipeline itself turns clip_sample off and the offset to 1, whatever the folder says."""
    folder = pipeline_with(**changes)
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    check_schedule(load_recipe(tiny_recipe({"model.path": str(folder)})))  # no complaint
    family = load(path=str(folder)).family
    sampling = SamplingConfig(steps=10)
    loaded, saved = family.stepper(sampling), family.schedule(config, sampling, family.latent_shape)
    family.pipeline.scheduler.set_timesteps(10)
    assert loaded.timesteps.tolist() == sorted(set(family.pipeline.scheduler.timesteps.tolist()), reverse=True)
    assert loaded.timesteps.tolist() == saved.timesteps.tolist()
    assert np.array_equal(loaded.sigmas, saved.sigmas)


def test_a_schedule_that_thresholds_is_refused_before_and_at_loading(
    pipeline_with: Callable[..., Path], tiny_recipe: Callable[..., Path]
) -> None:
    """The must-fail twin: what the pipeline does not turn off is still refused, in both places."""
    folder = pipeline_with(thresholding=True)
    with pytest.raises(ModelError, match="thresholding is on"):
        check_schedule(load_recipe(tiny_recipe({"model.path": str(folder)})))
    with pytest.raises(ModelError, match="thresholding is on"):
        load(path=str(folder)).stepper(SamplingConfig(steps=10))


# ---- what a user can get wrong -----------------------------------------------------------------------------


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere: no such folder; set model\.path"):
        load(path=str(tmp_path / "nowhere"))


def test_a_hub_name_that_is_not_cached_is_named() -> None:
    with pytest.raises(ModelError, match=r"nobody/nothing: neither a folder nor .*local_files_only=false"):
        load(path="nobody/nothing")


def test_a_folder_that_is_no_pipeline_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a diffusers pipeline"):
        load(path=str(tmp_path))


def test_a_pipeline_class_without_a_family_is_named_with_those_we_have(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(ModelError, match=r"KandinskyPipeline is not supported; use one of: StableDiffusionPipeline"):
        load(path=str(tmp_path))


def test_a_pipeline_with_a_missing_part_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text((tiny_pipeline() / "model_index.json").read_text())
    with pytest.raises(ModelError, match=r"its part scheduler is missing; download") as caught:
        load(path=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_adapter_targets_that_match_nothing_are_named() -> None:
    with pytest.raises(ModelError, match=r"no module matches model\.lora\.targets 'nonsense'"):
        load(lora=LoRAConfig(targets=("nonsense",)))


@pytest.mark.parametrize("bad", [{"rank": 0}, {"alpha": 0.0}, {"targets": ()}, {"dropout": 0.1}])
def test_impossible_adapter_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LoRAConfig.model_validate(bad)
