"""What the policy needs to know about one kind of pipeline, and the table of the kinds we have.

To add a family: one file with a class that satisfies ``Family`` (``PipelineFamily`` is a start), one line in
``FAMILIES``, or none at all: a recipe may name ``module:Class`` in ``model.family``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import nn

from diffusion.conditioning import Conditioning
from diffusion.noising import Noising
from diffusion.steps import Stepper
from raysteer.errors import ConfigError, ModelError
from raysteer.import_path import load_object

if TYPE_CHECKING:
    from diffusion.policy import ModelConfig
    from diffusion.sampling import SamplingConfig

#: diffusers pipeline class -> "module:class" of its family (imported only when such a model is loaded)
FAMILIES: dict[str, str] = {
    "StableDiffusionPipeline": "diffusion.families.stable_diffusion:StableDiffusion",
    "StableDiffusionXLPipeline": "diffusion.families.sdxl:StableDiffusionXL",
    "StableDiffusion3Pipeline": "diffusion.families.sd3:StableDiffusion3",
    "FluxPipeline": "diffusion.families.flux:Flux",
}


@dataclass(frozen=True)
class Encoded:
    """One prompt as its family's denoiser takes it.

    Attributes:
        parts: named tensors without a batch dimension, for example {"embeds": [L, D], "pooled": [P]}.
        truncated: the prompt was longer than a tokenizer's limit, and its end was cut off.
    """

    parts: Mapping[str, torch.Tensor]
    truncated: bool


class Family(Protocol):
    """One kind of pipeline. Guidance, adapters, caching and rounding are the policy's business, not the family's.

    Attributes:
        pipeline: the diffusers pipeline itself.
        component: name of the trained module inside the pipeline and prefix of its adapter keys ("unet").
        denoiser: that module.
        latent_shape: (C, h, w) of one latent.
        default_targets: the modules a LoRA adapts when the recipe names none.
        embedded_guidance: guidance is an input of the denoiser (FLUX.1-dev), so a prediction is one forward.
    """

    pipeline: Any
    component: str
    denoiser: nn.Module
    latent_shape: tuple[int, int, int]
    default_targets: ClassVar[tuple[str, ...]]
    embedded_guidance: bool

    @classmethod
    def load(cls, config: ModelConfig, dtypes: Mapping[str, torch.dtype]) -> Family:
        """Load the parts on the CPU, frozen and in eval mode. ``dtypes`` has "default" and may name parts."""
        ...

    def to(self, device: torch.device) -> None:
        """Move every part but the text encoders."""
        ...

    def text_to(self, device: torch.device) -> None:
        """Move the text encoders."""
        ...

    def encode(self, prompt: str) -> Encoded:
        """One prompt, encoded where the text encoders are; the empty prompt gives the unconditional input."""
        ...

    def denoise(
        self, x_t: torch.Tensor, timestep: float | torch.Tensor, cond: Conditioning, guidance_scale: float | None
    ) -> torch.Tensor:
        """Model output [n, C, h, w] for latents [n, C, h, w]. ``guidance_scale`` matters when it is embedded.

        ``timestep`` is one number for all, or [n] with one for each latent.
        """
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images [n, 3, H, W] in [-1, 1] (may overshoot)."""
        ...

    @staticmethod
    def schedule(
        scheduler_config: Mapping[str, Any],
        sampling: SamplingConfig,
        latent_shape: tuple[int, int, int],
        deterministic: bool = False,
    ) -> Stepper:
        """The schedule of a scheduler's config: the same whether read from the model's folder or from the loaded
        pipeline, so that a preflight and the samplers agree. ``deterministic``: the same times without noise."""
        ...

    def stepper(self, sampling: SamplingConfig, deterministic: bool = False) -> Stepper:
        """The schedule of this pipeline."""
        ...

    @staticmethod
    def noising(scheduler_config: Mapping[str, Any]) -> Noising:
        """The forward process of a scheduler's config (ModelError when there is none we know)."""
        ...

    @staticmethod
    def check_guidance(embedded: bool, guidance_scale: float) -> None:
        """Refuse a guidance scale (ConfigError) that a model with or without embedded guidance cannot follow."""
        ...

    @staticmethod
    def native_latent_shape(configs: Mapping[str, Mapping[str, Any]], resolution: int | None) -> tuple[int, int, int]:
        """(C, h, w) at ``resolution`` pixels, None for the size the model was made for.

        Args:
            configs: component name -> its config ("unet" or "transformer", "vae"), read from files or loaded parts.

        Raises:
            ConfigError: the latents cannot have that size.
        """
        ...


class PipelineFamily:
    """What most families share: loading, freezing, moving and decoding. Satisfies ``Family`` with ``load``, ``encode``,
    ``denoise``, ``schedule`` and ``native_latent_shape`` added.
    """

    component: ClassVar[str]
    default_targets: ClassVar[tuple[str, ...]]
    embedded_guidance: bool = False

    def __init__(self, pipeline: Any, resolution: int | None = None) -> None:
        self.pipeline: Any = pipeline
        self.denoiser: nn.Module = getattr(pipeline, self.component)
        configs = {self.component: pipeline.components[self.component].config, "vae": pipeline.vae.config}
        self.latent_shape: tuple[int, int, int] = self.native_latent_shape(configs, resolution)  # type: ignore[attr-defined]
        for _, part in self._parts():
            part.requires_grad_(False)
            part.eval()

    @staticmethod
    def read(pipeline_class: Any, config: ModelConfig, dtypes: Mapping[str, torch.dtype], **options: Any) -> Any:
        """A diffusers pipeline as the recipe wants it. Parts that are None in ``options`` are not loaded."""
        return pipeline_class.from_pretrained(
            config.path,
            revision=config.revision,
            variant=config.variant,
            local_files_only=config.local_files_only,
            dtype=dict(dtypes),
            **options,
        )

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.pipeline.vae
        latents = latents.to(vae.dtype) / vae.config.scaling_factor
        if vae.config.shift_factor:
            latents = latents + vae.config.shift_factor
        return vae.decode(latents, return_dict=False)[0]

    def to(self, device: torch.device) -> None:
        for name, part in self._parts():
            if not name.startswith("text_encoder"):
                part.to(device)

    def text_to(self, device: torch.device) -> None:
        for name, part in self._parts():
            if name.startswith("text_encoder"):
                part.to(device)

    def stepper(self, sampling: SamplingConfig, deterministic: bool = False) -> Stepper:
        config = self.pipeline.scheduler.config
        return self.schedule(config, sampling, self.latent_shape, deterministic)  # type: ignore[attr-defined]

    @staticmethod
    def noising(scheduler_config: Mapping[str, Any]) -> Noising:
        """To be replaced by families that objective gdro may train."""
        raise ModelError(
            "model.family", "it has no forward process (noising)", "add the method, or train with another objective"
        )

    @staticmethod
    def check_guidance(embedded: bool, guidance_scale: float) -> None:
        """Classifier-free guidance takes any scale."""

    def _parts(self) -> Iterator[tuple[str, nn.Module]]:
        return ((name, part) for name, part in self.pipeline.components.items() if isinstance(part, nn.Module))


def float_timesteps(timestep: float | torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
    """One float32 timestep for each latent [n], as rectified-flow transformers take them."""
    if isinstance(timestep, torch.Tensor):
        return timestep.to(x_t.device, torch.float32)
    return torch.full((len(x_t),), timestep, dtype=torch.float32, device=x_t.device)


def whole_timesteps(timestep: float | torch.Tensor) -> int | torch.Tensor:
    """Whole timesteps, as UNets take them: one for all, or [n]."""
    return timestep.long() if isinstance(timestep, torch.Tensor) else int(timestep)


def family_for(pipeline_class: str, own: str | None = None) -> type[Any] | None:
    """The family class for a diffusers pipeline class name, or None when there is none.

    Args:
        own: "module:Class" of a family that takes the place of ours (``model.family``).

    Raises:
        ConfigError: there is no such module or class.
    """
    target = FAMILIES.get(pipeline_class) if own is None else own
    return None if target is None else load_object(target, "model.family")


def vae_factor(vae_config: Mapping[str, Any]) -> int:
    """Pixels per latent, on each side: every block of a diffusers VAE but the last halves its input."""
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


def latents_on_side(resolution: int, vae_config: Mapping[str, Any], packing: int = 1) -> int:
    """Latents on one side of a square image of ``resolution`` pixels.

    Args:
        packing: the denoiser takes ``packing`` x ``packing`` latents as one token.

    Raises:
        ConfigError: the resolution is no whole number of tokens.
    """
    factor = vae_factor(vae_config)
    step = factor * packing
    if resolution < step or resolution % step:
        nearest = max(step, round(resolution / step) * step)
        raise ConfigError(
            "model.resolution", resolution, f"images of this model have a multiple of {step} pixels: use {nearest}"
        )
    return resolution // factor


def square_unet_latents(configs: Mapping[str, Mapping[str, Any]], resolution: int | None) -> tuple[int, int, int]:
    """``native_latent_shape`` of the UNet families.

    Raises:
        ConfigError: the resolution is no whole number of latents.
        ModelError: the UNet takes more than latents (an inpainting model).
    """
    unet = configs["unet"]
    channels, size = int(unet["in_channels"]), unet["sample_size"]
    if channels != unet.get("out_channels", channels):
        raise ModelError(
            "unet", f"takes {channels} channels and gives {unet['out_channels']}", "use a text-to-image model"
        )
    if resolution is not None:
        size = latents_on_side(resolution, configs["vae"])
    height, width = (size, size) if isinstance(size, int) else size
    return channels, int(height), int(width)


def unsupported(subject: str, pipeline_class: str) -> ModelError:
    """The refusal of a pipeline without a family."""
    return ModelError(
        subject,
        f"pipeline class {pipeline_class} is not supported",
        f"use one of: {', '.join(FAMILIES)}; or name your own family in model.family (docs/extending.md)",
    )


def count_tokens(tokenizer: Any, prompt: str) -> int:
    """Length of a prompt in tokens, begin and end tokens included, however long it is."""
    return len(tokenizer(prompt, truncation=False, padding=False, verbose=False).input_ids)


def is_too_long(tokenizer: Any, prompt: str, limit: int | None = None) -> bool:
    """Whether a tokenizer would cut the prompt off at ``limit`` tokens (None: its own limit)."""
    return count_tokens(tokenizer, prompt) > (tokenizer.model_max_length if limit is None else limit)
