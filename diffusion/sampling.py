"""Drawing groups: which steps are trained, how a group is sampled, what is kept of it.

Invariants
1. A group is a function of (adapter, prompt, seeds, step_seed, config): all noise comes from one CPU generator per
   image, so the machine, the device and the order of work change nothing about the noise.
2. The trained steps are shared by the whole group, and their sigma is at least ``min_sigma``. A sliding window is
   shared by every group of a learner step.
3. A trajectory keeps only the trained transitions (x_t, x_prev), in the dtype in which they were scored.
4. The noise of a step depends on image and step alone: not on which steps are trained, not on the schedule being mixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, model_validator

from diffusion.flow_steps import FlowNoiseConfig
from diffusion.loading import DTYPES
from diffusion.steps import Stepper
from raysteer.errors import ConfigError

if TYPE_CHECKING:
    from diffusion.policy import DiffusionPolicy


_STRIDE, _EVERY = 1, 25  # MixGRPO's own


class TrainedStepsConfig(BaseModel, frozen=True, extra="forbid"):
    """Which denoising steps of a group are trained.

    Eligible are the steps ``first <= i < last`` with sigma of at least ``min_sigma``. ``random`` takes ``count`` of
    them at random, ``window`` a random run of ``count`` neighbours, ``all`` every one; each group has its own choice.
    ``sliding`` is one window for all groups of a learner step: it starts at the first eligible step, moves on by
    ``stride`` steps after every ``every`` learner steps, and from the end to the beginning again (MixGRPO, Li et al.
    2025). Instead of ``count``, ``fraction`` gives the number as a share of the steps from first to last, so that it
    follows a change of ``sampling.steps``. With neither, all eligible are taken. ``last=None`` is all but the last
    step (its sigma is at or near zero).
    """

    mode: Literal["random", "window", "sliding", "all"] = "random"
    count: int | None = Field(default=None, ge=1)
    fraction: float | None = Field(default=None, gt=0.0, le=1.0)
    first: int = Field(default=0, ge=0)
    last: int | None = Field(default=None, ge=1)
    min_sigma: float = Field(default=0.02, gt=0.0, allow_inf_nan=False)
    stride: int = Field(default=_STRIDE, ge=1)
    every: int = Field(default=_EVERY, ge=1)

    @model_validator(mode="after")
    def _possible(self) -> TrainedStepsConfig:
        if self.count is not None and self.fraction is not None:
            raise ValueError(f"fraction ({self.fraction:g}) and count ({self.count}) exclude each other: leave one out")
        for name in ("count", "fraction"):
            if self.mode == "all" and getattr(self, name) is not None:
                raise ValueError(
                    f"mode 'all' trains every eligible step: leave {name} out, or use mode 'random' or 'window'"
                )
        if self.mode == "sliding" and self.count is None and self.fraction is None:
            raise ValueError("mode 'sliding' moves a window: give its count (or fraction)")
        if self.mode != "sliding" and (self.stride, self.every) != (_STRIDE, _EVERY):
            raise ValueError(f"mode '{self.mode}' moves nothing: leave stride and every out, or use mode 'sliding'")
        if self.last is not None and self.last <= self.first:
            raise ValueError(f"last ({self.last}) is exclusive and must be larger than first ({self.first})")
        return self

    def span(self, steps: int) -> range:
        """The steps from first to last of a schedule of ``steps`` steps, whatever their sigma."""
        return range(self.first, steps - 1 if self.last is None else self.last)

    def number(self, steps: int) -> int:
        """How many steps of a schedule of ``steps`` steps are trained, if ``min_sigma`` leaves as many."""
        if self.count is not None:
            return self.count
        offered = len(self.span(steps))
        return offered if self.fraction is None else max(1, round(self.fraction * offered))


class SamplingConfig(BaseModel, frozen=True, extra="forbid"):
    """How one group of ``group_size`` images of one prompt is drawn.

    ``eta`` is the noise of UNet families (DDIM), ``flow`` that of rectified-flow families; each ignores the other's.
    ``shift`` takes the place of a flow scheduler's own. With ``mixed`` the steps that are not trained are
    deterministic (DDIM eta 0, Euler), so that all noise after the start is noise the learner will replay (MixGRPO).
    """

    steps: int = Field(default=50, ge=1)
    eta: float = Field(default=1.0, gt=0.0, le=1.0)
    flow: FlowNoiseConfig = FlowNoiseConfig()
    shift: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    mixed: bool = False
    guidance_scale: float = Field(default=5.0, ge=0.0, allow_inf_nan=False)
    group_size: int = Field(default=16, ge=2)
    same_initial_noise: bool = False
    trained: TrainedStepsConfig = TrainedStepsConfig()

    @model_validator(mode="after")
    def _inside_the_schedule(self) -> SamplingConfig:
        last = self.trained.span(self.steps).stop
        if last > self.steps:
            raise ValueError(f"trained.last is {last} but there are only {self.steps} steps: use {self.steps} or less")
        if self.trained.first >= last:
            raise ValueError(
                f"trained.first is {self.trained.first} but the last trainable step is {last - 1}: use a smaller first "
                "or more steps"
            )
        if self.trained.count is not None and self.trained.count > last - self.trained.first:
            raise ValueError(
                f"trained.count is {self.trained.count} but only {last - self.trained.first} steps lie between first "
                f"and last: use {last - self.trained.first} or less"
            )
        return self


@dataclass(frozen=True)
class Trajectory:
    """The trained transitions of one group, ready for the object store (numpy only).

    Attributes:
        prompt: the prompt of every image.
        step_index: int64 [K], ascending indices into the schedule.
        x_t, x_prev: [G, K, C, h, w] in ``dtype``; bfloat16 is kept as its uint16 bits.
        log_prob: float32 [G, K] of the policy that drew them.
        final_latents: [G, C, h, w], stored as ``x_t`` is.
        dtype: "float32", "bfloat16" or "float16".
    """

    prompt: str
    step_index: np.ndarray
    x_t: np.ndarray
    x_prev: np.ndarray
    log_prob: np.ndarray
    final_latents: np.ndarray
    dtype: str

    @classmethod
    def of_latents(cls, prompt: str, latents: np.ndarray | torch.Tensor) -> Trajectory:
        """A group of which only the final latents [G, C, h, w] are known: no step of it can be replayed (K = 0).

        Args:
            latents: float32, or bfloat16 or float16 as a tensor; kept in that dtype.

        Raises:
            ValueError: not latents of images.
        """
        tensor = latents if isinstance(latents, torch.Tensor) else torch.from_numpy(np.array(latents))
        if tensor.ndim != 4 or not len(tensor):
            raise ValueError(f"latents must be [group_size, C, h, w], got shape {tuple(tensor.shape)}")
        group, *shape = tensor.shape
        final = tensor_to_array(tensor)
        return cls(
            prompt=prompt,
            step_index=np.empty(0, np.int64),
            x_t=np.empty((group, 0, *shape), final.dtype),
            x_prev=np.empty((group, 0, *shape), final.dtype),
            log_prob=np.empty((group, 0), np.float32),
            final_latents=final,
            dtype=_name_of(tensor.dtype),
        )

    @property
    def group_size(self) -> int:
        """Number of images G."""
        return self.x_t.shape[0]

    @property
    def num_positions(self) -> int:
        """Number of trained steps K."""
        return len(self.step_index)

    @property
    def nbytes(self) -> int:
        """Size in the object store, in bytes."""
        return sum(a.nbytes for a in (self.step_index, self.x_t, self.x_prev, self.log_prob, self.final_latents))

    def transition(self, position: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """(x_t, x_prev), each [G, C, h, w] in the storage dtype, of the trained step number ``position``."""
        x_t = array_to_tensor(self.x_t[:, position], self.dtype)
        return x_t.to(device), array_to_tensor(self.x_prev[:, position], self.dtype).to(device)

    def old_log_prob(self, position: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """float32 [G]: log-prob under the policy that drew the group."""
        return torch.tensor(self.log_prob[:, position]).to(device)

    def latents(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Final latents [G, C, h, w] in the storage dtype."""
        return array_to_tensor(self.final_latents, self.dtype).to(device)


@dataclass(frozen=True)
class Rollout:
    """A sampled group: uint8 images [G, H, W, 3] and what the learner needs of how they came about."""

    images: np.ndarray
    trajectory: Trajectory


def tensor_to_array(tensor: torch.Tensor) -> np.ndarray:
    """numpy copy; bfloat16, which numpy lacks, as its uint16 bits."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy().copy()


def _name_of(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


def array_to_tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    """Inverse of ``tensor_to_array``; copies, so read-only arrays from the object store are fine."""
    tensor = torch.from_numpy(np.array(array, order="C"))
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def eligible_steps(cfg: SamplingConfig, stepper: Stepper) -> tuple[int, ...]:
    """Indices of the steps that may be trained.

    Raises:
        ConfigError: the range reaches beyond the schedule, or no step has noise enough.
    """
    trained = cfg.trained
    span = trained.span(stepper.num_steps)
    if span.stop > stepper.num_steps:
        raise ConfigError(
            "sampling.trained.last", span.stop, f"the schedule has {stepper.num_steps} steps: use that or less"
        )
    eligible = tuple(i for i in span if stepper.sigmas[i] >= trained.min_sigma)
    if not eligible:
        raise ConfigError(
            "sampling.trained",
            f"steps {span.start}..{span.stop - 1} with sigma >= {trained.min_sigma:g}",
            f"no step of this schedule qualifies (largest sigma {float(stepper.sigmas.max()):.4f}): "
            "lower min_sigma, raise eta or widen first/last",
        )
    if trained.count is not None and trained.count > len(eligible):
        raise ConfigError(
            "sampling.trained.count", trained.count, f"only {len(eligible)} steps qualify: use {len(eligible)} or less"
        )
    return eligible


def choose_trained_steps(cfg: SamplingConfig, stepper: Stepper, seed: int, step: int = 0) -> tuple[int, ...]:
    """Indices of the trained steps, ascending; a pure function of its arguments, one choice for the whole group.

    Args:
        seed: the group's own, for the random modes.
        step: the learner step that the group is meant for, for the sliding window.

    Raises:
        ConfigError: see ``eligible_steps``.
    """
    eligible = eligible_steps(cfg, stepper)
    count = min(cfg.trained.number(stepper.num_steps), len(eligible))
    rng = np.random.Generator(np.random.Philox(seed))
    if cfg.trained.mode == "sliding":
        start = step // cfg.trained.every * cfg.trained.stride % (len(eligible) - count + 1)
        return eligible[start : start + count]
    if cfg.trained.mode == "window":
        start = int(rng.integers(len(eligible) - count + 1))
        return eligible[start : start + count]
    if cfg.trained.mode == "random":
        return tuple(sorted(int(i) for i in rng.choice(eligible, size=count, replace=False)))
    return eligible


@torch.no_grad()
def sample_rollout(
    policy: DiffusionPolicy, prompt: str, seeds: Sequence[int], cfg: SamplingConfig, step_seed: int, step: int = 0
) -> Rollout:
    """Draw one group in one batch.

    Args:
        prompt: the prompt of the whole group.
        seeds: one seed per image; it decides the image's initial noise and the noise of each of its steps.
        cfg: sampling configuration; ``len(seeds)`` must be its ``group_size``.
        step_seed, step: decide which steps are trained (see ``choose_trained_steps``).
    """
    if len(seeds) != cfg.group_size:
        raise ValueError(f"{len(seeds)} seeds for a group of {cfg.group_size}")
    stepper = policy.stepper(cfg)
    quiet = policy.stepper(cfg, deterministic=True) if cfg.mixed else stepper
    trained = choose_trained_steps(cfg, stepper, step_seed, step)
    generators = [_generator(seed) for seed in seeds]
    x = _noise(policy, generators)
    if cfg.same_initial_noise:  # every generator has drawn its own first, so the noise of the steps stays the same
        x = x[:1].expand_as(x).contiguous()
    x = x.to(policy.dtype)
    cond = policy.encode([prompt]).expand(len(seeds))
    kept_x_t, kept_x_prev, kept_log_prob = [], [], []
    for i in range(stepper.num_steps):
        output = policy.predict(x, float(stepper.timesteps[i]), cond, cfg.guidance_scale)
        noise = _noise(policy, generators) if stepper.sigmas[i] > 0 else None  # drawn even where `quiet` ignores it
        taken = (stepper if i in trained else quiet).step(output, x, i, noise, policy.dtype)
        if i in trained:
            assert taken.log_prob is not None  # eligible steps have sigma >= min_sigma > 0
            kept_x_t.append(x.cpu())
            kept_x_prev.append(taken.x_prev.cpu())
            kept_log_prob.append(taken.log_prob.cpu())
        x = taken.x_prev
    trajectory = Trajectory(
        prompt=prompt,
        step_index=np.array(trained, np.int64),
        x_t=tensor_to_array(torch.stack(kept_x_t, 1)),
        x_prev=tensor_to_array(torch.stack(kept_x_prev, 1)),
        log_prob=tensor_to_array(torch.stack(kept_log_prob, 1)),
        final_latents=tensor_to_array(x),
        dtype=_name_of(policy.dtype),
    )
    return Rollout(policy.decode(x), trajectory)


@torch.no_grad()
def sample_deterministic(
    policy: DiffusionPolicy, prompt: str, seeds: Sequence[int], steps: int, guidance_scale: float
) -> Rollout:
    """Draw one group in one batch as ``generate`` draws images: its latents are samples of the model itself, not of a
    stochastic schedule, and no step of it can be trained.

    Args:
        prompt: the prompt of the whole group.
        seeds: one seed per image, which decides its initial noise.
    """
    x = _integrate(policy, [prompt] * len(seeds), seeds, deterministic_schedule(steps), guidance_scale)
    return Rollout(policy.decode(x), Trajectory.of_latents(prompt, x))


@torch.no_grad()
def generate(
    policy: DiffusionPolicy,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int,
    guidance_scale: float,
    batch_size: int = 16,
) -> np.ndarray:
    """Deterministic images for evaluation and previews: uint8 [n, H, W, 3], one per (prompt, seed) pair.

    The schedule is the pipeline's own (DDIM eta 0 or Euler, the scheduler's shift), as a user of it would have it.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
    if not prompts:
        raise ValueError("no prompts to generate")
    schedule, batches = deterministic_schedule(steps), []
    for start in range(0, len(prompts), batch_size):
        chosen = slice(start, start + batch_size)
        batches.append(policy.decode(_integrate(policy, prompts[chosen], seeds[chosen], schedule, guidance_scale)))
    return np.concatenate(batches)


def deterministic_schedule(steps: int) -> SamplingConfig:
    """``steps`` steps of the pipeline's own schedule: nothing of a recipe's noise or shift."""
    return SamplingConfig(steps=steps, trained=TrainedStepsConfig(last=steps))


def _integrate(
    policy: DiffusionPolicy, prompts: Sequence[str], seeds: Sequence[int], schedule: SamplingConfig, guidance: float
) -> torch.Tensor:
    """Final latents [n, C, h, w] in the policy's dtype, without noise after the start."""
    stepper = policy.stepper(schedule, deterministic=True)
    x = _noise(policy, [_generator(seed) for seed in seeds]).to(policy.dtype)
    cond = policy.encode(prompts)
    for i in range(stepper.num_steps):
        output = policy.predict(x, float(stepper.timesteps[i]), cond, guidance)
        x = stepper.step(output, x, i, None, policy.dtype).x_prev
    return x


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(int(seed))


def _noise(policy: DiffusionPolicy, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Standard normal float32 [n, C, h, w], drawn on the CPU image by image, then moved."""
    drawn = [torch.randn(policy.latent_shape, generator=generator) for generator in generators]
    return torch.stack(drawn).to(policy.device)
