"""The policy: a frozen diffusers pipeline plus a trainable LoRA adapter, the same object in sampler and learner.

Invariants
1. Sampler and learner call the same ``predict`` on the same batch shape, so a fresh sample replays with ratio 1.
2. The base weights never change and are never copied: the reference policy is this policy with its adapter off.
3. Adapter parameters are float32 whatever the dtype of the base model.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, field_validator
from torch import nn

from diffusion.adapters import ALPHA_SUFFIX, AdapterState
from diffusion.families.base import FAMILIES, Family, family_for
from diffusion.steps import Stepper, at_least_float32
from raysteer.errors import ModelError

if TYPE_CHECKING:
    from diffusion.sampling import SamplingConfig

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_ADAPTER = "default"
_CACHED_PROMPTS = 512  # SD 1.x: 77 x 768 float32 = 231 KiB each
_DECODE_CHUNK = 8  # bounds the decoder's memory: 512x512 images cost it about 1 GiB each in float32


class LoRAConfig(BaseModel, frozen=True, extra="forbid"):
    """Low-rank adapter (Hu et al. 2021): W + alpha / rank * B A on every module whose name ends in a target."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0.0, allow_inf_nan=False)
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")

    @field_validator("targets")
    @classmethod
    def _named(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if not targets or not all(name.strip() for name in targets):
            raise ValueError('name at least one module to adapt, for example ["to_q", "to_k", "to_v", "to_out.0"]')
        return targets


class ModelConfig(BaseModel, frozen=True, extra="forbid"):
    """Which pipeline to train, in which dtype, with which adapter. ``path`` is a folder or a hub name."""

    path: str = Field(min_length=1)
    revision: str | None = None
    variant: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    local_files_only: bool = True
    gradient_checkpointing: bool = False
    lora: LoRAConfig = LoRAConfig()


class DiffusionPolicy:
    """A diffusion model as a policy over denoising steps.

    Attributes:
        family: the pipeline's parts behind one small interface.
        denoiser: the trained module (base weights frozen, adapter trainable).
        latent_shape: (C, h, w).
        device, dtype: where the policy computes, and in what its latents are stored.
    """

    def __init__(self, family: Family, config: ModelConfig, device: str | torch.device = "cpu", adapter_seed: int = 0):
        self.config = config
        self.family = family
        self.denoiser: nn.Module = family.denoiser
        self.latent_shape = family.latent_shape
        self.device = torch.device(device)
        self.dtype = DTYPES[config.dtype]
        self._embeds: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._adapter_on = True
        self._add_adapter(adapter_seed)
        if config.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        family.to(self.device)

    @classmethod
    def load(cls, cfg: ModelConfig, device: str | torch.device = "cpu", adapter_seed: int = 0) -> DiffusionPolicy:
        """Load the pipeline ``cfg.path`` and add a seeded adapter that changes nothing yet (B = 0).

        Raises:
            ModelError: no such model, not a pipeline, or a pipeline class without a family.
        """
        pipeline_class = read_pipeline_class(cfg)
        family_class = family_for(pipeline_class)
        if family_class is None:
            raise ModelError(
                cfg.path, f"pipeline class {pipeline_class} is not supported", f"use one of: {', '.join(FAMILIES)}"
            )
        try:
            with _quiet_loading():
                family = family_class.load(cfg, DTYPES[cfg.dtype])
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(
                cfg.path, f"cannot be loaded ({reason})", "check the folder's parts, model.variant and model.revision"
            ) from error
        return cls(family, cfg, device, adapter_seed)

    def _add_adapter(self, seed: int) -> None:
        from peft import LoraConfig

        lora = self.config.lora
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                self.denoiser.add_adapter(  # type: ignore[operator]
                    LoraConfig(
                        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), init_lora_weights=True
                    ),
                    adapter_name=_ADAPTER,
                )
            except ValueError as error:
                raise ModelError(
                    self.config.path,
                    f"no module matches model.lora.targets {list(lora.targets)}",
                    "name attention projections of this denoiser, for example to_q",
                ) from error
        for parameter in self.trainable_parameters():
            parameter.data = parameter.data.float()  # peft gives them the base dtype; small updates need float32

    # ---- conditioning -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        """Embeddings [n, L, D] of the prompts, on the policy's device.

        Each prompt is encoded alone and cached, so its embedding never depends on what it is batched with.
        """
        return torch.stack([self._encode_one(prompt) for prompt in prompts])

    def _encode_one(self, prompt: str) -> torch.Tensor:
        embeds = self._embeds.get(prompt)
        if embeds is None:
            embeds = self._embeds[prompt] = self.family.encode(prompt).detach()
            if len(self._embeds) > _CACHED_PROMPTS:
                self._embeds.popitem(last=False)
        self._embeds.move_to_end(prompt)
        return embeds

    # ---- denoising ----------------------------------------------------------------------------------------------

    def predict(
        self,
        x_t: torch.Tensor,
        i_timestep: int,
        embeds: torch.Tensor,
        guidance_scale: float,
        detach_uncond: bool = False,
    ) -> torch.Tensor:
        """Model output [n, C, h, w] with classifier-free guidance (Ho & Salimans 2022), one timestep for the batch.

        Args:
            x_t: latents [n, C, h, w]; cast to the policy's dtype.
            i_timestep: the timestep itself (``stepper.timesteps[i]``), not the step index.
            embeds: [n, L, D] from ``encode``.
            guidance_scale: 1 means no guidance and half the cost.
            detach_uncond: no gradient through the unconditional half. It then runs as a forward of its own: cheaper
                to train, but on some kernels not bit-identical to the one batched forward of the sampler.
        """
        x_t, embeds = x_t.to(self.dtype), embeds.to(self.dtype)
        timestep = int(i_timestep)
        if guidance_scale == 1.0:
            return self.family.denoise(x_t, timestep, embeds)
        uncond_embeds = self.encode([""]).to(self.dtype).expand(len(x_t), -1, -1)
        if detach_uncond:
            with torch.no_grad():
                uncond = self.family.denoise(x_t, timestep, uncond_embeds)
            cond = self.family.denoise(x_t, timestep, embeds)
        else:
            both = self.family.denoise(torch.cat([x_t, x_t]), timestep, torch.cat([uncond_embeds, embeds]))
            uncond, cond = both.chunk(2)
        uncond, cond = at_least_float32(uncond), at_least_float32(cond)  # guidance amplifies half precision's rounding
        return uncond + guidance_scale * (cond - uncond)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """uint8 images [n, H, W, 3] of final latents [n, C, h, w]; rounded to the nearest level, not truncated."""
        images = [self.family.decode(chunk.to(self.dtype)).float().cpu() for chunk in latents.split(_DECODE_CHUNK)]
        levels = ((torch.cat(images) / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return levels.permute(0, 2, 3, 1).contiguous().numpy()

    def stepper(self, sampling_cfg: SamplingConfig) -> Stepper:
        """The stochastic schedule of a sampling configuration."""
        return self.family.stepper(sampling_cfg.steps, sampling_cfg.eta)

    # ---- adapter ------------------------------------------------------------------------------------------------

    def named_trainable_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Adapter parameters in a fixed order, named as in ``adapter_state``."""
        named = []
        for name, parameter in self.denoiser.named_parameters():
            if f".{_ADAPTER}.weight" in name:
                named.append((f"{self.family.component}.{name.replace(f'.{_ADAPTER}', '')}", parameter))
        return named

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Adapter parameters (float32), in the order of ``named_trainable_parameters``."""
        return [parameter for _, parameter in self.named_trainable_parameters()]

    def adapter_state(self) -> AdapterState:
        """A copy of the adapter as float32 numpy, with its alpha (see ``diffusion.adapters``)."""
        state = {name: p.detach().cpu().numpy().copy() for name, p in self.named_trainable_parameters()}
        state[self.family.component + ALPHA_SUFFIX] = np.array([self.config.lora.alpha], np.float32)
        return state

    @torch.no_grad()
    def load_adapter(self, state: Mapping[str, np.ndarray]) -> None:
        """Overwrite the adapter in place.

        Raises:
            ModelError: the state has other modules, another rank or another alpha than this policy.
        """
        expected = self.adapter_state()
        for name in sorted(set(expected) ^ set(state)):
            problem = "is missing" if name in expected else "is not part of this policy"
            raise ModelError(
                "adapter", f"{name} {problem}", "use an adapter made for this model and model.lora.targets"
            )
        for name, current in expected.items():
            if state[name].shape != current.shape:
                raise ModelError(
                    "adapter",
                    f"{name} has shape {state[name].shape}, not {current.shape}",
                    "set model.lora.rank to match",
                )
            if name.endswith(ALPHA_SUFFIX) and state[name][0] != current[0]:
                raise ModelError(
                    "adapter", f"alpha is {state[name][0]:g}, not {current[0]:g}", "set model.lora.alpha to match"
                )
        for name, parameter in self.named_trainable_parameters():
            parameter.copy_(torch.from_numpy(np.array(state[name], np.float32)))

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """The reference policy: inside, the adapter contributes nothing. May be nested."""
        if not self._adapter_on:
            yield
            return
        self.denoiser.disable_adapters()  # type: ignore[operator]
        self._adapter_on = False
        try:
            yield
        finally:
            self._adapter_on = True
            self.denoiser.enable_adapters()  # type: ignore[operator]


def read_pipeline_class(cfg: ModelConfig) -> str:
    """Class name of the diffusers pipeline at ``cfg.path``, without loading any weights.

    Raises:
        ModelError: no such folder or cached model, or it is not a diffusers pipeline.
    """
    from diffusers import DiffusionPipeline

    folder = Path(cfg.path)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ModelError(
            cfg.path, "is not a diffusers pipeline (no model_index.json)", "save one there with pipe.save_pretrained"
        )
    looks_local = cfg.path.startswith((".", "/", "~")) or cfg.path.count("/") != 1
    if looks_local and not folder.is_dir():
        raise ModelError(cfg.path, "no such folder", "set model.path to a folder made with pipe.save_pretrained")
    try:
        index = DiffusionPipeline.load_config(
            cfg.path, revision=cfg.revision, local_files_only=cfg.local_files_only and not folder.is_dir()
        )
    except (OSError, ValueError) as error:
        remedy = "give a folder, or download the model first"
        if cfg.local_files_only:
            remedy += " (or set model.local_files_only=false)"
        raise ModelError(cfg.path, "neither a folder nor a model in the local hub cache", remedy) from error
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise ModelError(cfg.path, "its model_index.json names no pipeline class", "save the pipeline again")
    return name


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No progress bars while loading: a cluster has many loaders and one terminal."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        diffusers_logging.enable_progress_bar()
        transformers_logging.enable_progress_bar()
