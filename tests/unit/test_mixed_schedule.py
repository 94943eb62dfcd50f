"""A mixed schedule: stochastic where it is trained, deterministic elsewhere, in a window that moves over training."""

import functools

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from diffusion.policy import DiffusionPolicy, LoRAConfig, ModelConfig
from diffusion.sampling import Rollout, SamplingConfig, TrainedStepsConfig, choose_trained_steps, sample_rollout
from diffusion.steps import DDIMEta
from learner.grpo import GRPO, GRPOConfig
from tests.tiny import tiny_pipeline
from tests.unit.test_steps import SD1

PROMPT, SEEDS = "a toxic sign", (11, 12, 13)
SLIDING = TrainedStepsConfig(mode="sliding", count=2, every=1)
CFG = SamplingConfig(steps=8, group_size=3, guidance_scale=3.0, mixed=True, trained=SLIDING)


@functools.cache
def policy_in(dtype: str) -> DiffusionPolicy:
    config = {"path": str(tiny_pipeline()), "dtype": dtype, "lora": LoRAConfig(rank=4, alpha=8.0)}
    policy = DiffusionPolicy.load(ModelConfig.model_validate(config))
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.trainable_parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy


def rollout(step: int, dtype: str = "float32", cfg: SamplingConfig = CFG) -> Rollout:
    return sample_rollout(policy_in(dtype), PROMPT, SEEDS, cfg, step_seed=0, step=step)


@torch.no_grad()
def denoised(policy: DiffusionPolicy, x: torch.Tensor, steps: range) -> torch.Tensor:
    """``x`` after deterministic steps: DDIM with eta 0."""
    stepper = policy.stepper(CFG, deterministic=True)
    assert not stepper.sigmas.any()
    cond = policy.encode([PROMPT]).expand(len(x))
    for i in steps:
        output = policy.predict(x, float(stepper.timesteps[i]), cond, CFG.guidance_scale)
        x = stepper.step(output, x, i, None, policy.dtype).x_prev
    return x


def noises(seed: int) -> list[torch.Tensor]:
    """What one image's generator draws: its start, then the noise of each step."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn((4, 8, 8), generator=generator) for _ in range(1 + CFG.steps)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_outside_the_window_every_step_is_the_deterministic_one_to_the_bit(dtype: str) -> None:
    policy, t = policy_in(dtype), rollout(step=3, dtype=dtype).trajectory
    assert t.step_index.tolist() == [3, 4]
    before = denoised(policy, torch.stack([noises(seed)[0] for seed in SEEDS]).to(policy.dtype), range(3))
    assert torch.equal(before, t.transition(0)[0])
    after = denoised(policy, t.transition(1)[1], range(5, 8))
    assert torch.equal(after, t.latents())


def test_without_mixing_the_other_steps_are_noisy() -> None:
    """The must-fail twin."""
    policy = policy_in("float32")
    t = rollout(3, cfg=CFG.model_copy(update={"mixed": False})).trajectory
    assert (denoised(policy, t.transition(1)[1], range(5, 8)) - t.latents()).abs().max() > 0.1


@torch.no_grad()
def test_the_noise_of_a_trained_step_belongs_to_its_place_whatever_the_others_are() -> None:
    policy = policy_in("float32")
    stepper = policy.stepper(CFG)
    for cfg in (CFG, CFG.model_copy(update={"mixed": False})):
        t = rollout(3, cfg=cfg).trajectory
        for position, i in enumerate(t.step_index):
            x_t, x_prev = t.transition(position)
            output = policy.predict(x_t, float(stepper.timesteps[i]), policy.encode([PROMPT]).expand(3), 3.0)
            drawn = (x_prev - stepper.mean(output, x_t, int(i))) / float(stepper.sigmas[i])
            expected = torch.stack([noises(seed)[1 + i] for seed in SEEDS])
            torch.testing.assert_close(drawn, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("step", [0, 3, 5])
def test_only_the_window_is_stored_and_it_replays_with_ratio_one(dtype: str, step: int) -> None:
    policy, t = policy_in(dtype), rollout(step, dtype).trajectory
    assert t.step_index.tolist() == [step, step + 1]
    assert t.x_t.shape == t.x_prev.shape == (3, 2, 4, 8, 8)
    assert GRPO(GRPOConfig()).parity(policy, policy.stepper(CFG), t, CFG.guidance_scale) == 0.0


def test_another_window_leads_to_other_images_from_the_same_start() -> None:
    assert not np.array_equal(rollout(0).images, rollout(5).images)


# ---- the window --------------------------------------------------------------------------------------------


@functools.cache
def schedule() -> DDIMEta:
    return DDIMEta.from_scheduler(SD1, 10, 1.0)


def window(step: int, seed: int = 0, **trained: object) -> tuple[int, ...]:
    config = TrainedStepsConfig.model_validate({"mode": "sliding", "count": 3, **trained})
    return choose_trained_steps(SamplingConfig(steps=10, trained=config), schedule(), seed, step)


def test_the_window_moves_on_after_every_few_learner_steps_and_wraps_around() -> None:
    starts = [window(step, every=2)[0] for step in range(16)]
    assert starts == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 0, 0]  # 9 eligible steps: 7 places for 3
    assert [window(step, every=1, stride=3)[0] for step in range(5)] == [0, 3, 6, 2, 5]
    assert all(window(step, every=1) == tuple(range(s, s + 3)) for step, s in enumerate([0, 1, 2, 3, 4, 5, 6, 0]))


def test_the_window_stays_25_learner_steps_unless_told_otherwise() -> None:
    assert [window(step)[0] for step in (0, 24, 25, 49, 50)] == [0, 0, 1, 1, 2]


def test_all_groups_of_a_learner_step_share_the_window() -> None:
    assert len({window(7, seed, every=1) for seed in range(50)}) == 1
    own = SamplingConfig(steps=10, trained=TrainedStepsConfig(mode="window", count=3))
    assert len({choose_trained_steps(own, schedule(), seed, 7) for seed in range(50)}) > 3  # the twin


def test_the_window_stays_inside_the_range_and_off_steps_with_little_noise() -> None:
    seen = {i for step in range(50) for i in window(step, every=1, first=2, last=8)}
    assert seen == set(range(2, 8))
    quiet = float(schedule().sigmas[7])
    seen = {i for step in range(50) for i in window(step, every=1, min_sigma=quiet)}
    assert seen == set(range(8))


def test_a_window_as_wide_as_the_range_stays_where_it_is() -> None:
    assert {window(step, every=1, count=9) for step in range(12)} == {tuple(range(9))}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"mode": "sliding"}, "mode 'sliding' moves a window: give its count"),
        ({"mode": "window", "count": 3, "every": 10}, "mode 'window' moves nothing: leave stride and every out"),
        ({"stride": 2}, "mode 'random' moves nothing"),
        ({"mode": "sliding", "count": 3, "every": 0}, "greater than or equal to 1"),
        ({"mode": "sliding", "count": 3, "stride": 0}, "greater than or equal to 1"),
    ],
)
def test_impossible_windows_are_refused(bad: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainedStepsConfig.model_validate(bad)


def test_a_window_survives_the_recipe_that_a_run_writes() -> None:
    for config in (TrainedStepsConfig(), SLIDING):
        assert TrainedStepsConfig.model_validate(config.model_dump()) == config
