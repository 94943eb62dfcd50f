"""Adapter files: plain diffusers reproduces the policy from them, exactly, and nothing wrong loads silently."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.numpy import load_file, save_file

from diffusion.adapters import WEIGHTS_NAME, adapter_metadata, checksum, load_adapter_file, save_adapter
from diffusion.policy import DiffusionPolicy, LoRAConfig, ModelConfig
from diffusion.sampling import generate
from raysteer.errors import ModelError
from tests.tiny import tiny_pipeline

# alpha is neither the rank nor a power of two times it: a loader that forgets it is found out
CONFIG = ModelConfig(path=str(tiny_pipeline()), lora=LoRAConfig(rank=4, alpha=6.0))
PROMPTS, SEEDS = ["a toxic sign", "a red circle"], [1, 2]


@pytest.fixture(scope="module")
def trained() -> DiffusionPolicy:
    """A policy whose adapter has visibly moved."""
    policy = DiffusionPolicy.load(CONFIG)
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.trainable_parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return policy


def plain_pipeline() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(CONFIG.path, local_files_only=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def unet_output(policy: DiffusionPolicy, unet: torch.nn.Module) -> torch.Tensor:
    x = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(3))
    return unet(x, 501, encoder_hidden_states=policy.encode(PROMPTS), return_dict=False)[0]


def test_plain_diffusers_reproduces_the_policy_exactly(trained: DiffusionPolicy, tmp_path: Path) -> None:
    save_adapter(trained.adapter_state(), tmp_path, {"run": "demo"})
    pipe = plain_pipeline()
    base = unet_output(trained, pipe.unet)
    pipe.load_lora_weights(tmp_path)
    assert pipe.get_list_adapters()  # an adapter with unknown keys loads as nothing, with a mere warning
    theirs = unet_output(trained, pipe.unet)
    assert torch.equal(theirs, unet_output(trained, trained.denoiser))
    assert (theirs - base).abs().max() > 0.01

    start = torch.stack([torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    images = pipe(PROMPTS, latents=start, num_inference_steps=4, guidance_scale=3.0, output_type="np").images
    ours = generate(trained, PROMPTS, SEEDS, steps=4, guidance_scale=3.0)
    assert np.abs(ours.astype(int) - (images * 255).round().astype(int)).max() <= 1


def test_without_the_alpha_in_its_header_the_same_file_gives_another_model(
    trained: DiffusionPolicy, tmp_path: Path
) -> None:
    """The must-fail twin of the test above."""
    path = save_adapter(trained.adapter_state(), tmp_path)
    save_file(load_file(path), path)
    pipe = plain_pipeline()
    pipe.load_lora_weights(tmp_path)
    difference = unet_output(trained, pipe.unet) - unet_output(trained, trained.denoiser)
    assert difference.abs().max() > 1e-3


def test_a_saved_adapter_comes_back_bit_for_bit(trained: DiffusionPolicy, tmp_path: Path) -> None:
    state = trained.adapter_state()
    path = save_adapter(state, tmp_path / "new" / "folder", {"run": "demo", "version": "7"})
    assert path.name == WEIGHTS_NAME
    assert [file.name for file in path.parent.iterdir()] == [WEIGHTS_NAME]  # nothing half-written beside it
    for where in (path, path.parent):
        assert checksum(load_adapter_file(where)) == checksum(state)
        assert adapter_metadata(where) == {"run": "demo", "version": "7"}
    fresh = DiffusionPolicy.load(CONFIG, adapter_seed=9)
    fresh.load_adapter(load_adapter_file(path))
    assert torch.equal(unet_output(trained, fresh.denoiser), unet_output(trained, trained.denoiser))


def test_an_adapter_saved_by_diffusers_itself_loads_into_the_policy(trained: DiffusionPolicy, tmp_path: Path) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(trained.denoiser))
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    state = load_adapter_file(tmp_path)
    assert state["unet.lora_alpha"] == [4.0]  # no header: alpha is the rank, as diffusers has it
    policy = DiffusionPolicy.load(CONFIG.model_copy(update={"lora": LoRAConfig(rank=4, alpha=4.0)}))
    policy.load_adapter(state)
    pipe = plain_pipeline()
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(unet_output(policy, policy.denoiser), unet_output(policy, pipe.unet))


def test_the_checksum_sees_every_value_and_the_alpha_but_not_the_order(trained: DiffusionPolicy) -> None:
    state = trained.adapter_state()
    reference = checksum(state)
    assert checksum(dict(reversed(state.items()))) == reference
    for name in (next(iter(state)), "unet.lora_alpha"):
        changed = {key: array.copy() for key, array in state.items()}
        changed[name].flat[0] = np.nextafter(changed[name].flat[0], np.float32(9))
        assert checksum(changed) != reference
    renamed = dict(state)
    renamed["unet.other"] = renamed.pop(next(iter(state)))
    assert checksum(renamed) != reference
    assert checksum({"a": np.zeros((2, 3), np.float32)}) != checksum({"a": np.zeros((3, 2), np.float32)})


def test_the_file_is_plain_safetensors_with_the_keys_diffusers_expects(
    trained: DiffusionPolicy, tmp_path: Path
) -> None:
    path = save_adapter(trained.adapter_state(), tmp_path)
    weights = load_file(path)
    assert all(key.startswith("unet.") and key.endswith((".lora_A.weight", ".lora_B.weight")) for key in weights)
    assert all(array.dtype == np.float32 for array in weights.values())
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]
    lora = json.loads(header["lora_adapter_metadata"])
    assert (lora["unet.r"], lora["unet.lora_alpha"]) == (4, 6.0)


def test_a_missing_adapter_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"{WEIGHTS_NAME}: no such adapter file"):
        load_adapter_file(tmp_path)


def test_a_file_that_is_not_safetensors_is_named(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS_NAME).write_bytes(b"PK\x03\x04 this is a pickle in disguise")
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load_adapter_file(tmp_path)


def test_a_file_without_lora_matrices_is_named(tmp_path: Path) -> None:
    save_file({"unet.conv_in.weight": np.zeros((2, 2), np.float32)}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ModelError, match="holds no LoRA matrices"):
        load_adapter_file(tmp_path)


def test_half_an_adapter_state_is_not_saved(trained: DiffusionPolicy, tmp_path: Path) -> None:
    state = trained.adapter_state()
    alpha = state.pop("unet.lora_alpha")
    with pytest.raises(ModelError, match="no single …lora_alpha"):
        save_adapter(state, tmp_path)
    with pytest.raises(ModelError, match="no LoRA matrices of one rank"):
        save_adapter({"unet.lora_alpha": alpha}, tmp_path)
    assert not (tmp_path / WEIGHTS_NAME).exists()
