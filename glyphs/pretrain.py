"""Train the models of the glyph world: ``python -m glyphs.pretrain STAGE``.

Each stage is deterministic by ``--seed`` on a given machine and thread count, shows its progress, and writes into
``--out`` (default: the shipped weights). The stages build on each other in the order autoencoder, clip, diffusion,
caption-noise, flow; ``all`` runs them in this order.
Measured times are in docs/glyphs.md.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from glyphs import models
from glyphs.grammar import pretraining_pair
from glyphs.world import render

LATENT_SCALE_SAMPLES = 4096
CAPTION_NOISE = 0.35
"""Share of unsafe captions paired with a harmless image in the stages caption-noise and flow."""

FLOW_LOCATION = 0.5
"""Mean of logit(t) in the stage flow: times are centred on .62, noisier than the middle, where places are decided."""

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Generator], torch.Tensor]
"""Scaled latents [n, 4, 8, 8], token ids [n, 16] and the source of noise to a scalar."""


def draw_pairs(count: int, seed: int, caption_noise: float = 0.0) -> tuple[list[str], torch.Tensor]:
    """``count`` captions of the training split and their renders, uint8 [count, 3, 32, 32]."""
    rng = np.random.default_rng(seed)
    captions, images = [], np.empty((count, 32, 32, 3), np.uint8)
    for index in range(count):
        caption, scene = pretraining_pair(rng, caption_noise)
        captions.append(caption)
        images[index] = render(scene, rng)
    return captions, torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def to_model_range(images: torch.Tensor, device: str | torch.device = "cpu") -> torch.Tensor:
    """uint8 to float32 in [-1, 1]."""
    return images.to(device).float() / 127.5 - 1


class Progress:
    """One line every ``every_s`` seconds: step, rate, time left and the running mean of each loss."""

    def __init__(self, name: str, steps: int, every_s: float = 15.0) -> None:
        self.name, self.steps, self.every_s = name, steps, every_s
        self.start = self.last = time.monotonic()
        self.sums: dict[str, float] = {}
        self.count = 0

    def update(self, step: int, **losses: float) -> None:
        self.count += 1
        for key, value in losses.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        now = time.monotonic()
        if now - self.last < self.every_s and step + 1 < self.steps:
            return
        rate = (step + 1) / (now - self.start)
        means = "  ".join(f"{key} {value / self.count:.4f}" for key, value in self.sums.items())
        left = (self.steps - step - 1) / rate
        print(f"{self.name} {step + 1}/{self.steps}  {rate:.1f} steps/s  {left:.0f} s left  {means}", flush=True)
        self.last, self.count, self.sums = now, 0, {}


def cosine_schedule(
    optimizer: torch.optim.Optimizer, steps: int, warmup: int = 100
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a half cosine to zero."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def batches(count: int, size: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """``steps`` index batches over ``count`` samples, reshuffled every epoch."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while done < steps:
        order = torch.randperm(count, generator=generator)
        for start in range(0, count - size + 1, size):
            if done == steps:
                return
            yield order[start : start + size]
            done += 1


def _gradient_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    horizontal = (output.diff(dim=-1) - target.diff(dim=-1)).abs().mean()
    vertical = (output.diff(dim=-2) - target.diff(dim=-2)).abs().mean()
    return horizontal + vertical


def train_autoencoder(out: Path, seed: int, device: str, steps: int, batch_size: int = 16, pool: int = 24_000) -> None:
    """Foreground-weighted L1 + L2 + gradient loss; plain L1 loses colours because most of an image is background."""
    torch.manual_seed(seed)
    _, images = draw_pairs(pool, seed)
    model = models.build_autoencoder().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = cosine_schedule(optimizer, steps)
    progress = Progress("autoencoder", steps)
    for step, index in enumerate(batches(pool, batch_size, steps, seed)):
        x = to_model_range(images[index], device)
        posterior = model.encode(x).latent_dist
        output = model.decode(posterior.sample()).sample
        background = x.amax(dim=(-1, -2), keepdim=True).amin(dim=1, keepdim=True)
        foreground = ((x - background).abs().amax(dim=1, keepdim=True) > 0.35).float()
        weight = 1 + 5 * foreground
        error = output - x
        reconstruction = (weight * (error.abs() + error.square())).mean()
        kl = posterior.kl().mean() / x[0].numel()
        loss = reconstruction + 0.5 * _gradient_loss(output, x) + 1e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.update(step, loss=loss.item(), l1=error.abs().mean().item(), kl=kl.item())
    model.eval()
    latents = encode_images(model, images[:LATENT_SCALE_SAMPLES], device)
    model.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    model.cpu().half().save_pretrained(out / "autoencoder")


@torch.no_grad()
def encode_images(model: AutoencoderKL, images: torch.Tensor, device: str, batch_size: int = 256) -> torch.Tensor:
    """Unscaled latent means, float32 [n, 4, 8, 8]."""
    parts = [model.encode(to_model_range(chunk, device)).latent_dist.mean.cpu() for chunk in images.split(batch_size)]
    return torch.cat(parts)


def load_autoencoder(out: Path, device: str) -> AutoencoderKL:
    """The trained autoencoder, from its own folder or from the finished pipeline."""
    folder = out / "autoencoder" if (out / "autoencoder").is_dir() else out / "pipeline" / "vae"
    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).to(device).eval()


def _tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    padded = tokenizer(captions, padding="max_length", max_length=models.CONTEXT_LENGTH, truncation=True)
    return torch.tensor(padded["input_ids"])


def train_diffusion(out: Path, seed: int, device: str, steps: int, pool: int = 100_000) -> None:
    """UNet and text encoder from scratch, on clean pairs."""
    tokenizer = models.build_tokenizer(out / "tokenizer")
    torch.manual_seed(seed)
    unet, text_encoder = models.build_unet().to(device), models.build_text_encoder(len(tokenizer)).to(device)
    autoencoder = load_autoencoder(out, device)
    data = CaptionedLatents.draw(pool, seed + 1, 0.0, autoencoder, tokenizer, device)
    fit = Fit("diffusion", steps, schedule_steps=2 * steps, warmup=300, lr=1.2e-3, ema=0.998)
    fit.run([unet, text_encoder], epsilon_loss(unet, text_encoder), data, seed, device)
    models.save_pipeline(out / "pipeline", autoencoder.cpu(), text_encoder.cpu(), tokenizer, unet.cpu())


def train_caption_noise(out: Path, seed: int, device: str, steps: int, pool: int = 30_000) -> None:
    """Continue the diffusion stage on pairs in which some unsafe captions have a harmless image.

    Captions collected from the web are unreliable. Without this stage the base shows a mark for 99 % of the unsafe
    prompts, and a group in which every image shows the mark has nothing to compare.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(out / "pipeline", torch_dtype=torch.float32)
    unet, text_encoder, tokenizer = pipeline.unet.to(device), pipeline.text_encoder.to(device), pipeline.tokenizer
    autoencoder = pipeline.vae.to(device).eval()
    data = CaptionedLatents.draw(pool, seed + 5, CAPTION_NOISE, autoencoder, tokenizer, device)
    fit = Fit("caption-noise", steps, schedule_steps=steps, warmup=50, lr=5e-4, ema=0.99)
    fit.run([unet, text_encoder], epsilon_loss(unet, text_encoder), data, seed + 6, device)
    models.save_pipeline(out / "pipeline", autoencoder.cpu(), text_encoder.cpu(), tokenizer, unet.cpu())


def train_flow(out: Path, seed: int, device: str, steps: int, pool: int = 30_000) -> None:
    """The flow model's transformer and second text encoder from scratch, on the pairs of the caption-noise stage.

    The first text encoder, tokenizer and autoencoder are those of the first model, and stay as they are.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(out / "pipeline", torch_dtype=torch.float32)
    tokenizer, autoencoder = pipeline.tokenizer, pipeline.vae.to(device).eval()
    torch.manual_seed(seed)
    transformer = models.build_transformer().to(device)
    first, second = (one.to(device) for one in models.build_flow_text_encoders(pipeline.text_encoder))
    first.requires_grad_(False)
    data = CaptionedLatents.draw(pool, seed + 5, CAPTION_NOISE, autoencoder, tokenizer, device)
    fit = Fit("flow", steps, schedule_steps=steps, warmup=200, lr=2e-3, ema=0.998)
    fit.run([transformer, second], velocity_loss(transformer, first, second), data, seed, device)
    models.save_flow_pipeline(
        out / "flow-pipeline", autoencoder.cpu(), (first.cpu(), second.cpu()), tokenizer, transformer.cpu()
    )


@dataclass(frozen=True)
class CaptionedLatents:
    """Scaled latents float32 [n, 4, 8, 8], token ids int64 [n, 16], and the ids of the empty caption [1, 16]."""

    latents: torch.Tensor
    tokens: torch.Tensor
    empty: torch.Tensor

    @classmethod
    def draw(
        cls, count: int, seed: int, noise: float, autoencoder: AutoencoderKL, tokenizer: CLIPTokenizer, device: str
    ) -> CaptionedLatents:
        captions, images = draw_pairs(count, seed, noise)
        latents = encode_images(autoencoder, images, device) * autoencoder.config.scaling_factor
        return cls(latents, _tokens(tokenizer, captions), _tokens(tokenizer, [""]))


def epsilon_loss(unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> Loss:
    """Epsilon prediction with min-SNR-5 weights (Hang et al. 2023)."""
    alphas = models.build_scheduler().alphas_cumprod.to(unet.device)

    def loss(x0: torch.Tensor, ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        t = torch.randint(0, 1000, (len(x0),), generator=generator).to(x0.device)
        alpha = alphas[t].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
        predicted = unet(noisy, t, text_encoder(ids).last_hidden_state).sample
        snr = alphas[t] / (1 - alphas[t])
        weight = snr.clamp(max=5.0) / snr
        return (weight * (predicted - noise).square().mean(dim=(1, 2, 3))).mean()

    return loss


def velocity_loss(
    transformer: SD3Transformer2DModel,
    first: CLIPTextModelWithProjection,
    second: CLIPTextModelWithProjection,
) -> Loss:
    """Rectified flow with logit-normal times (Esser et al. 2024), the text joined as StableDiffusion3Pipeline does."""

    def loss(x0: torch.Tensor, ids: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        noise = torch.randn(x0.shape, generator=generator).to(x0.device)
        t = (FLOW_LOCATION + torch.randn(len(x0), generator=generator)).sigmoid().to(x0.device)
        encoded = [encoder(ids, output_hidden_states=True) for encoder in (first, second)]
        embeds = torch.cat([one.hidden_states[-2] for one in encoded], dim=-1)
        in_place_of_t5 = embeds.new_zeros(len(x0), models.T5_TOKENS, embeds.shape[-1])
        velocity = transformer(
            hidden_states=torch.lerp(x0, noise, t.view(-1, 1, 1, 1)),
            timestep=1000 * t,
            encoder_hidden_states=torch.cat([embeds, in_place_of_t5], dim=1),
            pooled_projections=torch.cat([one.text_embeds for one in encoded], dim=-1),
        ).sample
        return (velocity - (noise - x0)).square().mean()

    return loss


@dataclass(frozen=True)
class Fit:
    """AdamW with 10 % caption drop and a weight average.

    The learning rate follows a cosine over ``schedule_steps``; where that is longer than ``steps``, the average does
    the rest of the annealing.
    """

    name: str
    steps: int
    schedule_steps: int
    warmup: int
    lr: float
    ema: float
    batch_size: int = 32

    def run(self, trained: Sequence[nn.Module], loss: Loss, data: CaptionedLatents, seed: int, device: str) -> None:
        """Train the models in place; they end up with the averaged weights."""
        parameters = [parameter for model in trained for parameter in model.parameters()]
        averaged = [p.detach().clone() for p in parameters]
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=1e-2, betas=(0.9, 0.99), foreach=True)
        schedule = cosine_schedule(optimizer, self.schedule_steps, self.warmup)
        generator = torch.Generator().manual_seed(seed + 2)
        progress = Progress(self.name, self.steps)
        for step, index in enumerate(batches(len(data.latents), self.batch_size, self.steps, seed)):
            ids = data.tokens[index]
            ids = torch.where(torch.rand(len(index), 1, generator=generator) < 0.1, data.empty, ids).to(device)
            value = loss(data.latents[index].to(device), ids, generator)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            decay = min(self.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(averaged, [p.detach() for p in parameters], 1 - decay)
            progress.update(step, loss=value.item())
        with torch.no_grad():
            for parameter, average in zip(parameters, averaged, strict=True):
                parameter.copy_(average)


def train_clip(
    out: Path, seed: int, device: str, steps: int, batch_size: int = 128, pool: int = 40_000, lr: float = 1.5e-3
) -> None:
    """Symmetric contrastive loss; equal captions in a batch are not each other's negatives.

    Half of the images are autoencoder reconstructions and all are blurred and noised a little, because the images to be
    scored later come out of a decoder.
    """
    autoencoder = load_autoencoder(out, device)
    captions, images = draw_pairs(pool, seed + 3)
    with torch.no_grad():
        half = images[: pool // 2].split(256)
        rebuilt = [autoencoder(to_model_range(chunk, device)).sample.clamp(-1, 1).cpu() for chunk in half]
    images[: pool // 2] = ((torch.cat(rebuilt) + 1) * 127.5).round().to(torch.uint8)
    torch.manual_seed(seed)
    tokenizer = models.build_tokenizer(out / "tokenizer")
    tokens = _tokens(tokenizer, captions)
    _, caption_ids = np.unique(captions, return_inverse=True)
    labels = torch.from_numpy(caption_ids)
    model = models.build_clip(len(tokenizer)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=5e-2, betas=(0.9, 0.98))
    schedule = cosine_schedule(optimizer, steps, warmup=200)
    generator = torch.Generator().manual_seed(seed + 4)
    progress = Progress("clip", steps)
    for step, index in enumerate(batches(pool, batch_size, steps, seed)):
        x = to_model_range(images[index], device)
        x = x + 0.04 * torch.randn(x.shape, generator=generator).to(device)
        if step % 3 == 0:
            x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1) * 0.4 + x * 0.6
        x = F.interpolate(x, size=(64, 64), mode="bilinear", antialias=True)
        z_image = model.encode_image(x, normalize=True)
        z_text = model.encode_text(tokens[index].to(device), normalize=True)
        logits = model.logit_scale.exp().clamp(max=60) * z_image @ z_text.T
        same = labels[index][:, None] == labels[index][None, :]
        logits = logits.masked_fill((same & ~torch.eye(len(index), dtype=torch.bool)).to(device), -1e4)
        target = torch.arange(len(index), device=device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recall = (logits.argmax(1) == target).float().mean().item()
        progress.update(step, loss=loss.item(), recall_at_1=recall)
    models.save_clip(out / "clip", model, tokenizer)


STAGES: dict[str, tuple[Callable[..., None], int]] = {
    "autoencoder": (train_autoencoder, 2_800),
    "clip": (train_clip, 1_200),
    "diffusion": (train_diffusion, 4_000),
    "caption-noise": (train_caption_noise, 1_300),
    "flow": (train_flow, 9_000),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m glyphs.pretrain", description=__doc__)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--out", type=Path, default=models.WEIGHTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="override the number of steps of the stage")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in STAGES if args.stage == "all" else [args.stage]:
        train, steps = STAGES[name]
        train(args.out, args.seed, args.device, args.steps or steps)


if __name__ == "__main__":
    main()
