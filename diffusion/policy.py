"""The policy: a frozen diffusers pipeline plus a trainable LoRA adapter, the same object in sampler and learner.

Invariants
1. Sampler and learner call the same ``predict`` on the same batch shape, so a fresh sample replays with ratio 1.
2. The base weights never change and are never copied: the reference policy is this policy with its adapter off.
3. Adapter parameters are float32 whatever the dtype of the base model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, field_validator
from torch import nn

from diffusion.adapters import ALPHA_SUFFIX, AdapterState
from diffusion.conditioning import Conditioning
from diffusion.families.base import Encoded, Family, family_for, unsupported
from diffusion.loading import DTYPES, T5_TOKENS, check_parts, part_dtypes, quiet_loading, read_index
from diffusion.noising import Noising
from diffusion.steps import Stepper, at_least_float32
from raysteer.errors import ModelError
from raysteer.import_path import is_import_path

if TYPE_CHECKING:
    from diffusion.sampling import SamplingConfig

Dtype = Literal["float32", "bfloat16", "float16"]
_ADAPTER = "default"
_CACHE_BYTES = 256 * 2**20  # SD 1.x: 77 x 768 float32 = 231 KiB a prompt; FLUX.1: 4 MiB
_DECODE_IMAGES, _DECODE_LATENTS = 8, 4 * 64 * 64  # a 512x512 image costs the decoder 0.75 GiB in float32


def decode_chunk(latent_shape: tuple[int, int, int]) -> int:
    """How many images are decoded at once: as many as bound the decoder's memory, and at most 8."""
    _, height, width = latent_shape
    return max(1, min(_DECODE_IMAGES, _DECODE_LATENTS // (height * width)))


class LoRAConfig(BaseModel, frozen=True, extra="forbid"):
    """Low-rank adapter (Hu et al. 2021): W + alpha / rank * B A on every module whose name ends in a target.

    ``targets=None`` takes those of the model's family.
    """

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0.0, allow_inf_nan=False)
    targets: tuple[str, ...] | None = None

    @field_validator("targets")
    @classmethod
    def _named(cls, targets: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if targets is not None and not (targets and all(name.strip() for name in targets)):
            raise ValueError("name at least one module to adapt, for example to_q, or leave targets out")
        return targets


class ModelConfig(BaseModel, frozen=True, extra="forbid"):
    """Which pipeline to train, in which dtype, with which adapter. ``path`` is a folder or a hub name.

    ``component_dtypes`` names the parts whose dtype differs, for example {"vae": "float32"}. ``resolution`` is in
    pixels, images are square; None is the size the model was made for. With ``offload_text_encoders`` these live on
    the CPU and visit the device only to encode a prompt that is not cached. ``use_t5=false`` leaves the third text
    encoder of Stable Diffusion 3 out; ``t5_tokens`` is how many tokens the denoiser sees of it, or zeros in its place.
    ``family`` ("module:Class") takes the place of the family that the pipeline's class would have.
    """

    path: str = Field(min_length=1)
    revision: str | None = None
    variant: str | None = None
    dtype: Dtype = "float32"
    component_dtypes: dict[str, Dtype] = {}
    local_files_only: bool = True
    resolution: int | None = Field(default=None, ge=1)
    use_t5: bool = True
    t5_tokens: int = Field(default=T5_TOKENS, ge=1, le=512)
    offload_text_encoders: bool = False
    gradient_checkpointing: bool = False
    family: str | None = None
    lora: LoRAConfig = LoRAConfig()

    @field_validator("family")
    @classmethod
    def _import_path(cls, family: str | None) -> str | None:
        if family is not None and not is_import_path(family):
            raise ValueError(f"{family!r} is not an import path: write 'module:Class', or leave it out")
        return family

    def dtype_of(self, part: str) -> Dtype:
        """The dtype of one part of the pipeline."""
        return self.component_dtypes.get(part, self.dtype)


class DiffusionPolicy:
    """A diffusion model as a policy over denoising steps.

    Attributes:
        family: the pipeline's parts behind one small interface.
        denoiser: the trained module (base weights frozen, adapter trainable).
        latent_shape: (C, h, w).
        device, dtype: where the policy computes, and in what (the denoiser's) its latents are stored.
    """

    def __init__(self, family: Family, config: ModelConfig, device: str | torch.device = "cpu", adapter_seed: int = 0):
        self.config = config
        self.family = family
        self.denoiser: nn.Module = family.denoiser
        self.latent_shape = family.latent_shape
        self.device = torch.device(device)
        self.dtype = DTYPES[config.dtype_of(family.component)]
        self._encoded: OrderedDict[str, Encoded] = OrderedDict()
        self._adapter_on = True
        self._add_adapter(adapter_seed)
        if config.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        family.to(self.device)
        family.text_to(torch.device("cpu") if config.offload_text_encoders else self.device)

    @classmethod
    def load(cls, cfg: ModelConfig, device: str | torch.device = "cpu", adapter_seed: int = 0) -> DiffusionPolicy:
        """Load the pipeline ``cfg.path`` and add a seeded adapter that changes nothing yet (B = 0).

        Raises:
            ConfigError: a resolution or a part that this model does not have.
            ModelError: no such model, not a pipeline, a part is missing, or a pipeline class without a family.
        """
        index = read_index(cfg)
        family_class = family_for(index["_class_name"], cfg.family)
        if family_class is None:
            raise unsupported(cfg.path, index["_class_name"])
        check_parts(cfg, index)
        try:
            with quiet_loading():
                family = family_class.load(cfg, part_dtypes(cfg))
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ModelError(
                cfg.path, f"cannot be loaded ({reason})", "check the folder's parts, model.variant and model.revision"
            ) from error
        return cls(family, cfg, device, adapter_seed)

    def _add_adapter(self, seed: int) -> None:
        from peft import LoraConfig

        lora, path = self.config.lora, self.config.path
        modules = [name for name, _ in self.denoiser.named_modules()]
        for target in lora.targets or ():
            if not any(name == target or name.endswith(f".{target}") for name in modules):
                raise ModelError(
                    path,
                    f"no module matches model.lora.targets {target!r}",
                    "leave targets out, or name attention projections of this denoiser, for example to_q",
                )
        targets = list(lora.targets or self.family.default_targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                self.denoiser.add_adapter(  # type: ignore[operator]
                    LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, init_lora_weights=True),
                    adapter_name=_ADAPTER,
                )
            except ValueError as error:
                reason = str(error).strip().splitlines()[0]
                raise ModelError(
                    path, f"model.lora.targets {targets} cannot be adapted ({reason})", "name linear layers"
                ) from error
        for parameter in self.trainable_parameters():
            parameter.data = parameter.data.float()  # peft gives them the base dtype; small updates need float32

    # ---- conditioning -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of n prompts, on the policy's device.

        Each prompt is encoded alone and cached, so what it becomes never depends on what it is batched with.
        """
        encoded = [self._encode_one(prompt) for prompt in prompts]
        return Conditioning({name: torch.stack([one.parts[name] for one in encoded]) for name in encoded[0].parts})

    @torch.no_grad()
    def truncated(self, prompt: str) -> bool:
        """Whether the end of this prompt is cut off, because it is longer than a tokenizer's limit."""
        return self._encode_one(prompt).truncated

    def _encode_one(self, prompt: str) -> Encoded:
        encoded = self._encoded.get(prompt)
        if encoded is None:
            encoded = self._encoded[prompt] = self._encode_fresh(prompt)
            size = sum(part.nbytes for part in encoded.parts.values())
            while len(self._encoded) > max(1, _CACHE_BYTES // size):
                self._encoded.popitem(last=False)
        self._encoded.move_to_end(prompt)
        return encoded

    def _encode_fresh(self, prompt: str) -> Encoded:
        if self.config.offload_text_encoders:
            self.family.text_to(self.device)
        try:
            encoded = self.family.encode(prompt)
        finally:
            if self.config.offload_text_encoders:
                self.family.text_to(torch.device("cpu"))
        return Encoded({k: part.detach().to(self.device) for k, part in encoded.parts.items()}, encoded.truncated)

    # ---- denoising ----------------------------------------------------------------------------------------------

    def predict(
        self,
        x_t: torch.Tensor,
        timestep: float | torch.Tensor,
        cond: Conditioning,
        guidance_scale: float,
        detach_uncond: bool = False,
    ) -> torch.Tensor:
        """Model output [n, C, h, w] with guidance.

        Guidance is classifier-free (Ho & Salimans 2022), or an input of the denoiser where the family embeds it: then
        a prediction is one forward of the batch, and there is no unconditional half.

        Args:
            x_t: latents [n, C, h, w]; cast to the policy's dtype.
            timestep: the timestep itself (``stepper.timesteps[i]``), not the step index; a number for the whole batch,
                or a tensor [n] with one for each latent.
            cond: n prompts from ``encode``.
            guidance_scale: without embedded guidance, 1 means no guidance and half the cost.
            detach_uncond: no gradient through the unconditional half. It then runs as a forward of its own: cheaper
                to train, but on some kernels not bit-identical to the one batched forward of the sampler.
        """
        x_t, cond = x_t.to(self.dtype), cond.to(self.dtype)
        if self.family.embedded_guidance:
            return self.family.denoise(x_t, timestep, cond, guidance_scale)
        if guidance_scale == 1.0:
            return self.family.denoise(x_t, timestep, cond, None)
        empty = self.encode([""]).to(self.dtype).expand(len(x_t))
        if detach_uncond:
            with torch.no_grad():
                without = self.family.denoise(x_t, timestep, empty, None)
            given = self.family.denoise(x_t, timestep, cond, None)
        else:
            twice = torch.cat([timestep, timestep]) if isinstance(timestep, torch.Tensor) else timestep
            both = self.family.denoise(torch.cat([x_t, x_t]), twice, Conditioning.cat([empty, cond]), None)
            without, given = both.chunk(2)
        without, given = at_least_float32(without), at_least_float32(given)  # guidance amplifies rounding
        return without + guidance_scale * (given - without)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """uint8 images [n, H, W, 3] of final latents [n, C, h, w]; rounded to the nearest level, not truncated."""
        images = [
            self.family.decode(chunk.to(self.dtype)).float().cpu()
            for chunk in latents.split(decode_chunk(self.latent_shape))
        ]
        levels = ((torch.cat(images) / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return levels.permute(0, 2, 3, 1).contiguous().numpy()

    def stepper(self, sampling: SamplingConfig, deterministic: bool = False) -> Stepper:
        """The schedule of a sampling configuration, or the same times without noise."""
        return self.family.stepper(sampling, deterministic)

    @cached_property
    def noising(self) -> Noising:
        """The forward process: how clean latents are noised, and what is to be predicted there.

        Raises:
            ModelError: the family has none.
        """
        return self.family.noising(self.family.pipeline.scheduler.config)

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

    def set_adapter_scale(self, scale: float) -> None:
        """Multiply what the adapter adds to each module's output by ``scale``: 0 is the base model exactly, 1 the
        adapter exactly as trained. For looking at images; a trained policy keeps its 1.
        """
        from peft.tuners.lora import LoraLayer

        for module in self.denoiser.modules():
            if isinstance(module, LoraLayer):
                module.set_scale(_ADAPTER, scale)
        self._adapter_on = scale != 0.0
        switch = self.denoiser.enable_adapters if self._adapter_on else self.denoiser.disable_adapters
        switch()  # type: ignore[operator]

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
