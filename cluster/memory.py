"""Memory of every process of a run, estimated before anything is loaded, and of a GPU that several share.

Weights follow from the headers of the files, the adapter from its rank, activations from `cluster.activations`; what
a process takes before it holds a model is a constant. Caching allocators and convolution workspaces are not counted:
leave a tenth free.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.activations import Activations, decoder_bytes, denoiser_activations, vision_bytes
from cluster.modelfiles import PipelineFacts, count_parameters
from diffusion.loading import is_loaded
from diffusion.policy import decode_chunk
from learner.gdro import GDROConfig
from rewards.clip import clip_parameters

if TYPE_CHECKING:
    from cluster.config import Recipe
    from diffusion.policy import ModelConfig
    from rewards.config import ClipConfig, RewardConfig

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp32": 4, "bf16": 2, "fp16": 2}
_CPU_PROCESS = 400 * 2**20  # Python, torch and our packages; measured with benchmarks.loop
_CUDA_PROCESS = 800 * 2**20  # a CUDA context with cuBLAS and cuDNN: assumed, it depends on card and driver
_VIT_H = (257, 1280)  # tokens and width, for a vision tower whose config we cannot read


@dataclass(frozen=True)
class RoleMemory:
    """One process of a role.

    Attributes:
        count: most processes there may be; fewest: those a run needs, if not all.
        cpus, gpus: what it asks Ray for.
        parts: what takes its memory -> bytes (None: unknown).
        beside: bytes in main memory that a process on a GPU keeps there (offloaded text encoders).
    """

    role: str
    count: int
    cpus: float
    gpus: float
    parts: Mapping[str, int | None]
    beside: int = 0
    fewest: int | None = None

    @property
    def number(self) -> str:
        """How many there may be: "4", or "2..4"."""
        return f"{self.count}" if self.fewest in (None, self.count) else f"{self.fewest}..{self.count}"

    @property
    def total(self) -> int | None:
        """Bytes of one process, None when a part of it is unknown."""
        return None if None in self.parts.values() else sum(part or 0 for part in self.parts.values())

    def render(self) -> tuple[str, str]:
        """Label and text of its line in the plan."""
        where = f"{self.gpus:g} GPU" if self.gpus else f"{self.cpus:g} CPU"
        each = "unknown" if self.total is None else f"about {readable_bytes(self.total)}"
        parts = [
            f"{name} {'unknown' if size is None else readable_bytes(size)}"
            for name, size in self.parts.items()
            if size != 0
        ]
        beside = f"; {readable_bytes(self.beside)} of text encoders in main memory" if self.beside else ""
        return self.role, f"{self.number} × {where}; {each} each: {' + '.join(parts)}{beside}"


@dataclass(frozen=True)
class GpuLoad:
    """What the fullest GPU may hold: processes by role, and bytes of all of them."""

    processes: Mapping[str, int]
    total: int | None

    def render(self) -> str:
        """Its line in the plan."""
        held = " + ".join(f"{count} of {role}" for role, count in self.processes.items())
        return f"{'unknown' if self.total is None else f'about {readable_bytes(self.total)}'}: {held}"


def role_memory(recipe: Recipe, facts: PipelineFacts | None) -> tuple[RoleMemory, ...]:
    """Samplers, reward workers and learner of a recipe, and the evaluator beside training if it wants one.

    ``facts`` None: nothing is known of the model.
    """
    samplers, scorers, learner = recipe.samplers, recipe.reward_workers, recipe.learner
    weights, text = _weights(recipe.model, facts)
    adapter = None if facts is None or facts.adapter_parameters is None else 4 * facts.adapter_parameters
    drawing, learning = _activations(recipe, facts)
    ema = recipe.optimizer.ema_decay is not None
    trained = None if adapter is None else adapter * (5 if ema else 4)

    def role(
        name: str, sizes: Any, fewest: int, most: int, parts: dict[str, int | None], carries: int = 0
    ) -> RoleMemory:
        beside = 0
        if carries and sizes.num_gpus:  # they visit the GPU when nothing else is at work there
            beside = carries
            working = parts["activations"]
            parts["activations"] = None if working is None else max(working, carries)
        elif carries:
            parts["text encoders"] = carries
        parts["CUDA" if sizes.num_gpus else "process"] = _CUDA_PROCESS if sizes.num_gpus else _CPU_PROCESS
        return RoleMemory(name, most, sizes.num_cpus, sizes.num_gpus, parts, beside, fewest)

    away = text if recipe.model.offload_text_encoders else 0
    optimiser = "adapter, gradient, moments" + (", average" if ema else "")
    drawer: dict[str, int | None] = {"weights": weights, "adapter": adapter, "activations": drawing}
    scorer: dict[str, int | None] = {
        "weights": _reward_weights(recipe.reward),
        "activations": _scoring(recipe.reward, facts),
    }
    student: dict[str, int | None] = {"weights": weights, optimiser: trained, "activations": learning}
    members = (
        role("samplers", samplers, samplers.fewest, samplers.most, drawer, away),
        role("reward workers", scorers, scorers.fewest, scorers.most, scorer),
        role("learner", learner, learner.fewest, learner.workers, student, away),
    )
    if recipe.evaluation.every is None:
        return members
    return (*members, role("evaluator", samplers, 1, 1, _evaluating(recipe, facts, weights, adapter), away))


def fullest_gpu(roles: Sequence[RoleMemory]) -> GpuLoad | None:
    """The worst that can meet on one GPU, where Ray puts processes as long as their shares fit; None without GPUs."""
    sharing = [role for role in roles if role.gpus]
    if not sharing:
        return None
    ranges = [range(min(role.count, int(1.0 / min(role.gpus, 1.0) + 1e-6)) + 1) for role in sharing]
    worst: tuple[float, dict[str, int]] = (-1.0, {})
    for counts in product(*ranges):
        if sum(count * min(role.gpus, 1.0) for count, role in zip(counts, sharing, strict=True)) > 1.0 + 1e-6:
            continue
        held = {role.role: count for count, role in zip(counts, sharing, strict=True) if count}
        size = sum(count * (role.total or 0) for count, role in zip(counts, sharing, strict=True))
        worst = max(worst, (float(size), held), key=lambda one: one[0])
    unknown = any(role.total is None for role in sharing)
    return GpuLoad(worst[1], None if unknown else int(worst[0]))


def main_memory(roles: Sequence[RoleMemory]) -> int | None:
    """Bytes of as many processes as may compute on CPUs, and of what the others keep there; None: unknown."""
    totals = [0 if role.gpus else role.total for role in roles]
    if None in totals:
        return None
    return sum(role.count * ((total or 0) + role.beside) for role, total in zip(roles, totals, strict=True))


def readable_bytes(count: float) -> str:
    """``1536 * 2**20`` -> ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.3g} TiB"


# ---- the parts ------------------------------------------------------------------------------------------------------


def _weights(model: ModelConfig, facts: PipelineFacts | None) -> tuple[int | None, int]:
    """Bytes of the parts that stay on the device (None: unknown), and of the text encoders if they do not."""
    if facts is None or facts.component not in facts.parameters:
        return None, 0
    sizes = {
        part: count * _element_bytes(model, facts, part)
        for part, count in facts.parameters.items()
        if is_loaded(model, part)
    }
    text = sum(size for part, size in sizes.items() if part.startswith("text_encoder"))
    return sum(sizes.values()) - (text if model.offload_text_encoders else 0), text


def _element_bytes(model: ModelConfig, facts: PipelineFacts, part: str) -> int:
    if part == "vae" and part not in model.component_dtypes and facts.pipeline == "StableDiffusionXLPipeline":
        return 4 if facts.configs["vae"].get("force_upcast", True) else _ELEMENT_BYTES[model.dtype]
    return _ELEMENT_BYTES[model.dtype_of(part)]


def _activations(recipe: Recipe, facts: PipelineFacts | None) -> tuple[int | None, int | None]:
    """Bytes at the worst moment of a sampler and of a learner rank."""
    if facts is None or facts.latent_shape is None or facts.image_size is None:
        return None, None
    model, sampling, objective = recipe.model, recipe.sampling, recipe.objective
    e = _element_bytes(model, facts, facts.component)
    config = facts.configs[facts.component]
    one: Activations | None = denoiser_activations(config, facts.latent_shape, e, model.t5_tokens)
    if one is None:
        return None, None
    halves = 2 if sampling.guidance_scale != 1 and not facts.embedded_guidance else 1
    shown = len(recipe.tracking.preview_prompts) if recipe.tracking.preview_every else 0
    drawn = max(sampling.group_size, min(shown, 16))
    decoded = min(drawn, decode_chunk(facts.latent_shape))
    pixels = decoder_bytes(facts.configs["vae"], facts.image_size, _element_bytes(model, facts, "vae"))
    drawing = max(drawn * halves * one.inference, decoded * pixels)
    one_trained = one.checkpointed if model.gradient_checkpointing else one.training
    if isinstance(objective, GDROConfig):  # unguided, and the reference predicts before the graph is there
        return int(drawing), int(objective.images(sampling.group_size) * one_trained)
    learning = sampling.group_size * (halves if objective.train_guidance == "both" else 1) * one_trained
    if objective.kl_coef:  # the reference predicts while the graph of the policy waits
        learning += sampling.group_size * halves * one.inference
    return int(drawing), int(learning)


def _evaluating(
    recipe: Recipe, facts: PipelineFacts | None, weights: int | None, adapter: int | None
) -> dict[str, int | None]:
    """What takes the memory of the evaluator: it draws and scores in one process, one after the other."""
    from evaluation.scored import CHUNK  # only here: it imports the detector

    config = recipe.evaluation
    sampling = recipe.sampling.model_copy(update={"group_size": CHUNK, "guidance_scale": config.guidance_scale})
    without_previews = recipe.tracking.model_copy(update={"preview_every": 0})
    drawing, _ = _activations(recipe.model_copy(update={"sampling": sampling, "tracking": without_previews}), facts)
    rewards = ([recipe.reward] if config.reward else []) + ([config.judge.reward] if config.judge is not None else [])
    scoring = max((_scoring(reward, facts) for reward in rewards), default=0)
    models = [_reward_weights(reward) for reward in rewards]
    return {
        "weights": weights,
        "rewards": None if None in models else sum(size or 0 for size in models),
        "adapter": adapter,
        "activations": None if drawing is None else max(drawing, scoring),
    }


def _reward_weights(reward: RewardConfig) -> int | None:
    """Weights of all models the rewards look through, each once; None when one is on the hub."""
    counts: dict[object, int | None] = {}
    for _, term in reward.located():
        clip, pick = term.clip, term.pickscore
        if term.name == "pickscore" and pick is not None:
            folder = Path(pick.model)
            counts[pick] = count_parameters(folder) * _ELEMENT_BYTES[pick.precision] if folder.is_dir() else None
        elif clip is not None and term.name not in ("jpeg_compressibility", "nudenet"):
            known = clip_parameters(clip)
            counts[clip] = None if known is None else known * _ELEMENT_BYTES[clip.precision]
    return None if None in counts.values() else sum(count or 0 for count in counts.values())


def _scoring(reward: RewardConfig, facts: PipelineFacts | None) -> int:
    """Bytes of the largest chunk of images that some reward embeds at once."""
    image_size = 512 if facts is None or facts.image_size is None else facts.image_size
    largest = 0
    for _, term in reward.located():
        seen = term.pickscore if term.name == "pickscore" else term.clip
        if seen is not None:
            tokens, width = _VIT_H if term.clip is None else _vision(term.clip)
            one = vision_bytes(tokens, width, image_size, _ELEMENT_BYTES[seen.precision])
            largest = max(largest, seen.batch_size * one)
    return largest


def _vision(clip: ClipConfig) -> tuple[int, int]:
    """Tokens and width of a model's vision tower."""
    try:
        if clip.model.startswith("local-dir:"):
            file = Path(clip.model.removeprefix("local-dir:")) / "open_clip_config.json"
            config = json.loads(file.read_text(encoding="utf-8"))["model_cfg"]
        else:
            import open_clip

            config = open_clip.get_model_config(clip.model) or {}
        vision = config["vision_cfg"]
        if isinstance(vision.get("layers"), list):  # a ResNet: its stem is what counts
            return (vision["image_size"] // 2) ** 2, int(vision["width"])
        return (vision["image_size"] // vision["patch_size"]) ** 2 + 1, int(vision["width"])
    except (OSError, ValueError, KeyError, TypeError):
        return _VIT_H  # the preflight names what is wrong; here it is another kind of tower
