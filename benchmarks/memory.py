"""The plan's memory formula against the real modules: ``python -m benchmarks.memory [--model NAME ...] [--real]``.

Every denoiser is built from its published configuration, with a LoRA as the policy has it, and run forward and
backward on *fake* tensors: shapes and lifetimes are real, memory and arithmetic are not, so that a 12 B model fits a
laptop. Counted is the largest sum of living tensors, weights and inputs left out. ``--real`` runs on real tensors
instead, which shows that fake ones live as long as real ones, and prints the growth of the process besides.
"""

from __future__ import annotations

import argparse
import resource
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import raysteer  # noqa: F401  (installs the torchvision guard before anything imports torchvision)
from cluster.activations import Activations, decoder_bytes, denoiser_activations
from cluster.known_models import KNOWN
from diffusion.families.base import family_for, vae_factor
from diffusion.loading import DTYPES

NAMES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd35": "stabilityai/stable-diffusion-3.5-medium",
    "flux": "black-forest-labs/FLUX.1-dev",
}
MIB = 2**20


class LivingTensors(TorchDispatchMode):
    """Inside, every new tensor's storage is counted until nobody holds it any more.

    Attributes:
        now, peak: bytes alive at this moment and at most.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known or key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@dataclass(frozen=True)
class Counted:
    """Bytes per sample of one configuration, counted and by the formula."""

    counted: Activations
    formula: Activations


def build(
    config: Mapping[str, Any], targets: Sequence[str], dtype: torch.dtype, fake: Any, rank: int = 16
) -> nn.Module:
    """A denoiser with random weights (fake ones inside ``fake``) and a float32 adapter, as the policy has it."""
    import diffusers
    from peft import LoraConfig

    with torch.device("meta"):
        model: Any = getattr(diffusers, config["_class_name"])(**_arguments(config))
        model.add_adapter(LoraConfig(r=rank, lora_alpha=2.0 * rank, target_modules=list(targets)))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            kind = torch.float32 if parameter.requires_grad else dtype
            with fake:
                value = torch.empty(parameter.shape, dtype=kind).normal_(std=0.02)
            setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            with fake:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=dtype)
    return model.eval()


def inputs(config: Mapping[str, Any], latents: tuple[int, int, int], n: int, dtype: torch.dtype) -> dict[str, Any]:
    """What a denoiser of this class is called with, for a batch of n."""
    channels, height, width = latents
    if config["_class_name"] == "UNet2DConditionModel":
        given: dict[str, Any] = {
            "sample": torch.randn(n, channels, height, width, dtype=dtype),
            "timestep": 500,
            "encoder_hidden_states": torch.randn(n, 77, config["cross_attention_dim"], dtype=dtype),
        }
        if config.get("addition_embed_type") == "text_time":
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            added = {"text_embeds": torch.randn(n, pooled, dtype=dtype), "time_ids": torch.ones(n, 6, dtype=dtype)}
            given["added_cond_kwargs"] = added
        return given
    text = {"pooled_projections": torch.randn(n, config["pooled_projection_dim"], dtype=dtype)}
    if config["_class_name"] == "SD3Transformer2DModel":
        return text | {
            "hidden_states": torch.randn(n, channels, height, width, dtype=dtype),
            "timestep": torch.full((n,), 500.0),
            "encoder_hidden_states": torch.randn(n, 77 + 256, config["joint_attention_dim"], dtype=dtype),
        }
    tokens, words = height * width // 4, 512 if config["guidance_embeds"] else 256
    return text | {
        "hidden_states": torch.randn(n, tokens, config["in_channels"], dtype=dtype),
        "timestep": torch.full((n,), 0.5),
        "guidance": torch.full((n,), 3.5) if config["guidance_embeds"] else None,
        "encoder_hidden_states": torch.randn(n, words, config["joint_attention_dim"], dtype=dtype),
        "txt_ids": torch.zeros(words, 3),
        "img_ids": torch.zeros(tokens, 3),
    }


def count(
    config: Mapping[str, Any],
    targets: Sequence[str],
    latents: tuple[int, int, int],
    dtype: str,
    n: int = 1,
    real: bool = False,
) -> Counted:
    """Run a denoiser without gradient, with it, and with gradient checkpointing, and count what lives.

    Raises:
        ValueError: the formula knows nothing of this class.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    formula = denoiser_activations(config, latents, DTYPES[dtype].itemsize)
    if formula is None:
        raise ValueError(f"nothing is known of {config['_class_name']}")
    fake = nullcontext() if real else FakeTensorMode()
    model: Any = build(config, targets, DTYPES[dtype], fake)
    with fake:
        given = inputs(config, latents, n, DTYPES[dtype])
        known = [*model.parameters(), *model.buffers(), *(v for v in given.values() if isinstance(v, torch.Tensor))]
        with LivingTensors(known) as alone, torch.no_grad():
            model(**given, return_dict=False)
        training = _forward_and_backward(model, given, known)
        model.enable_gradient_checkpointing()
        checkpointed = _forward_and_backward(model, given, known)
    counted = Activations(alone.peak / n, training / n, checkpointed / n)
    return Counted(counted, formula)


def count_decoder(config: Mapping[str, Any], latents: tuple[int, int, int], dtype: str) -> int:
    """Bytes that decoding one latent takes beside the weights."""
    from diffusers import AutoencoderKL
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake, levels = FakeTensorMode(), len(config["block_out_channels"])
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    with torch.device("meta"):
        vae = AutoencoderKL(**(_arguments(config) | blocks | {"layers_per_block": 2})).eval()
    for module in vae.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            with fake:
                value = torch.empty(parameter.shape, dtype=DTYPES[dtype])
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    with fake, torch.no_grad():
        x = torch.randn(1, *latents, dtype=DTYPES[dtype])
        with LivingTensors([*vae.parameters(), x]) as living:
            vae.decode(x, return_dict=False)
    return living.peak


def _forward_and_backward(model: Any, given: Mapping[str, Any], known: Iterable[torch.Tensor]) -> int:
    with LivingTensors(known) as living:
        model(**given, return_dict=False)[0].float().pow(2).mean().backward()
    model.zero_grad(set_to_none=True)
    return living.peak


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of a configuration: lists become tuples, as loading makes them."""
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}


def measure(name: str, dtype: str, resolution: int | None, real: bool) -> list[str]:
    """Rows of the table for one model."""
    known = KNOWN[NAMES[name]]
    family = family_for(known.pipeline)
    assert family is not None
    latents = family.native_latent_shape(known.configs, resolution)
    side = latents[1] * vae_factor(known.configs["vae"])
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = count(known.configs[family.component], family.default_targets, latents, dtype, real=real)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    decoder = decoder_bytes(known.configs["vae"], side, DTYPES[dtype].itemsize)
    pairs = [
        ("inference", found.formula.inference, found.counted.inference),
        ("training", found.formula.training, found.counted.training),
        ("checkpointed", found.formula.checkpointed, found.counted.checkpointed),
    ]
    if not real:
        pairs.append(("decoder", decoder, count_decoder(known.configs["vae"], latents, dtype)))
    start = f"| {name} | {side} | {dtype} |"
    rows = [
        f"{start} {what} | {formula / MIB:,.0f} | {counted / MIB:,.0f} | {formula / counted - 1:+.0%} |"
        for what, formula, counted in pairs
    ]
    if real:
        rows.append(f"the process grew by {grown:,.0f} MiB, weights included")
    print(f"{name} {side} {dtype}: {time.monotonic() - started:.0f} s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--model", nargs="+", choices=sorted(NAMES), default=["sd15", "sd35"])
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=["bfloat16"])
    parser.add_argument("--resolution", type=int, help="pixels; each model's own by default")
    parser.add_argument("--real", action="store_true", help="real tensors: needs the memory it measures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row for name in args.model for dtype in args.dtype for row in measure(name, dtype, args.resolution, args.real)
    ]
    print(
        "| model | pixels | dtype | what | formula, MiB per sample | counted | error |\n|---|---|---|---|---|---|---|"
    )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
