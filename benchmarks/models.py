"""Every family against plain diffusers: ``python -m benchmarks.models [--device cuda] [--size sd15]``.

One process, one group after another, best of several: images per second of ``sample_rollout``, of the plain pipeline
without an adapter at equal steps, batch and guidance, and samples per second of a trained step (GRPO's loss forward and
backward; one image at one step is a sample). ``tiny`` are the random-weight pipelines of the tests, ``sd15`` is Stable
Diffusion 1.5 in its published size with random weights, at 512 pixels, 50 steps, guidance 5, in bfloat16 on CUDA.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import raysteer  # noqa: F401  (installs the torchvision guard before anything imports torchvision)
from cluster.known_models import KNOWN
from diffusion.policy import DiffusionPolicy, ModelConfig
from diffusion.sampling import SamplingConfig, TrainedStepsConfig, sample_rollout
from learner.grpo import GRPO, GRPOConfig
from tests import tiny, tiny_flow, tiny_unet

PROMPT = "a red circle"
TINY: dict[str, tuple[Callable[[], Path], dict[str, Any]]] = {
    "SD 1.x": (tiny.tiny_pipeline, {}),
    "SD 2.x (v)": (tiny_unet.tiny_sd2, {}),
    "SDXL": (tiny_unet.tiny_sdxl, {}),
    "SD 3.5": (tiny_flow.tiny_sd3, {}),
    "FLUX.1-dev": (tiny_flow.tiny_flux, {"resolution": tiny_flow.RESOLUTION}),
}


@dataclass(frozen=True)
class Speed:
    """Per second: images of the sampler, of the plain pipeline, samples of the learner; MiB at most."""

    sampler: float
    plain: float
    learner: float
    peak_mib: float


def measure(model: ModelConfig, device: str, steps: int, group: int, guidance: float, repeats: int) -> Speed:
    """Time one model. The peak is the device's on CUDA, else the largest size the process has had."""
    cfg = SamplingConfig(
        steps=steps, group_size=group, guidance_scale=guidance, trained=TrainedStepsConfig(count=min(4, steps - 1))
    )
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    policy = DiffusionPolicy.load(model, device)
    stepper, objective = policy.stepper(cfg), GRPO(GRPOConfig())
    trajectory = sample_rollout(policy, PROMPT, range(group), cfg, step_seed=0).trajectory
    advantages = np.linspace(-1, 1, group)

    def learn() -> None:
        for position in range(trajectory.num_positions):
            objective.loss(policy, stepper, trajectory, advantages, [position], guidance)[0].backward()
        policy.denoiser.zero_grad(set_to_none=True)

    sampled = best(lambda: sample_rollout(policy, PROMPT, range(group), cfg, step_seed=0), device, repeats)
    learnt = best(learn, device, repeats)
    pipeline = policy.family.pipeline
    policy.denoiser.delete_adapters("default")  # type: ignore[operator]
    pipeline.set_progress_bar_config(disable=True)
    side = {} if model.resolution is None else {"height": model.resolution, "width": model.resolution}
    drawing = {"num_inference_steps": steps, "num_images_per_prompt": group, "guidance_scale": guidance}
    plain = best(lambda: pipeline(PROMPT, output_type="np", **side, **drawing), device, repeats)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    return Speed(group / sampled, group / plain, group * trajectory.num_positions / learnt, peak)


def best(work: Callable[[], Any], device: str, repeats: int) -> float:
    """Seconds of the fastest of several calls, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def build_sd15(folder: Path) -> Path:
    """Stable Diffusion 1.5 in its published size with random weights; needs 4 GB of disk and of memory."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    small = StableDiffusionPipeline.from_pretrained(tiny.tiny_pipeline(), safety_checker=None)
    configs = KNOWN["stable-diffusion-v1-5/stable-diffusion-v1-5"].configs
    levels = len(configs["vae"]["block_out_channels"])
    vae = AutoencoderKL(
        block_out_channels=tuple(configs["vae"]["block_out_channels"]),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=2,
    )
    tokens = {key: getattr(small.text_encoder.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
        **tokens,
    )
    small.tokenizer.model_max_length = 77
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=small.tokenizer,
        unet=UNet2DConditionModel.from_config(dict(configs["unet"])),
        scheduler=small.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=["tiny", "sd15"], default="tiny")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--group", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.device == "cpu":
        torch.set_num_threads(1)
    print(
        "| model | sampler, images/s | plain pipeline, images/s | learner, samples/s | peak, MiB |\n"
        "|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory(prefix="raysteer-bench-") as folder:
        if args.size == "sd15":
            dtype = "bfloat16" if args.device == "cuda" else "float32"
            todo = {"SD 1.5 size": ModelConfig.model_validate({"path": str(build_sd15(Path(folder))), "dtype": dtype})}
        else:
            todo = {
                name: ModelConfig.model_validate({"path": str(make()), "lora": {"rank": 4}, **options})
                for name, (make, options) in TINY.items()
            }
        usual = (50, 16) if args.size == "sd15" else (10, 8)
        for name, model in todo.items():
            speed = measure(model, args.device, args.steps or usual[0], args.group or usual[1], 5.0, args.repeats)
            figures = f"{speed.sampler:.3g} | {speed.plain:.3g} | {speed.learner:.3g} | {speed.peak_mib:,.0f}"
            print(f"| {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
