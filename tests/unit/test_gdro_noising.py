"""The forward process: noised latents and targets are those the models were trained with, at a time for each image."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffusion.families.base import PipelineFamily
from diffusion.noising import BetaNoising, FlowNoising, TimesConfig
from diffusion.sampling import Trajectory
from raysteer.errors import ModelError
from tests.unit.test_family_invariants import MODELS, every_family, fresh

TIME = np.array([0.0, 0.2503, 0.5, 1.0])


def pair(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    x0, noise = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    return x0, noise


def test_a_flow_is_noised_along_the_straight_line_that_its_velocity_leads_back() -> None:
    x0, noise = pair()
    noised = FlowNoising(1000)(x0, noise, TIME)
    t = torch.from_numpy(TIME).view(-1, 1, 1, 1)
    torch.testing.assert_close(noised.x_t - t * noised.target, x0)
    torch.testing.assert_close(noised.x_t + (1 - t) * noised.target, noise)
    assert noised.timestep.tolist() == (TIME * 1000).astype(np.float32).tolist()
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    theirs = scheduler.scale_noise(x0, scheduler.timesteps[[1, 1, 1, 1]], noise)
    ours = FlowNoising(1000)(x0, noise, scheduler.sigmas[[1, 1, 1, 1]].double().numpy()).x_t
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_beta_schedule_is_noised_as_its_scheduler_does(prediction_type: str) -> None:
    x0, noise = pair()
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDPMScheduler(**config, prediction_type=prediction_type)
    noised = BetaNoising.from_scheduler(scheduler.config)(x0, noise, TIME)
    assert noised.timestep.tolist() == [0, 250, 500, 999]
    torch.testing.assert_close(noised.x_t, scheduler.add_noise(x0, noise, noised.timestep), rtol=1e-6, atol=1e-6)
    target = {"epsilon": noise, "sample": x0, "v_prediction": scheduler.get_velocity(x0, noise, noised.timestep)}
    torch.testing.assert_close(noised.target, target[prediction_type], rtol=1e-6, atol=1e-6)
    back = DDIMScheduler(**config, prediction_type=prediction_type, set_alpha_to_one=True, clip_sample=False)
    back.set_timesteps(1000)
    for image, step in enumerate(noised.timestep.tolist()):  # a perfect prediction leads back to the image
        found = back.step(noised.target[image], step, noised.x_t[image]).pred_original_sample
        torch.testing.assert_close(found, x0[image], rtol=1e-4, atol=1e-4)


def test_half_precision_latents_are_noised_in_float32() -> None:
    x0, noise = pair(torch.bfloat16)
    for noising in (FlowNoising(), BetaNoising(np.linspace(0.99, 0.01, 10))):
        noised = noising(x0, noise, TIME)
        assert noised.x_t.dtype == noised.target.dtype == torch.float32


def test_an_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(ModelError, match=r"scheduler: prediction_type 'score' is unknown; use epsilon"):
        BetaNoising(np.linspace(0.99, 0.01, 10), "score")


def test_a_family_without_a_forward_process_says_so() -> None:
    with pytest.raises(ModelError, match=r"model\.family: it has no forward process .*another objective"):
        PipelineFamily.noising({})


def test_times_lie_where_they_are_asked_for() -> None:
    def drawn(**times: Any) -> np.ndarray:
        return TimesConfig(**times).draw(np.random.default_rng(0), (4000,))

    assert drawn().min() < 0.01 and drawn().max() > 0.99 and abs(drawn().mean() - 0.5) < 0.02
    narrow = drawn(low=0.2, high=0.6)
    assert 0.2 <= narrow.min() < 0.21 and 0.59 < narrow.max() <= 0.6
    normal = drawn(kind="logit_normal", mean=0.0, std=1.0)
    assert normal.min() > 0.0 and normal.max() < 1.0
    assert np.mean((normal > 0.269) & (normal < 0.731)) == pytest.approx(0.683, abs=0.02)  # one standard deviation
    assert drawn(kind="logit_normal", mean=1.0).mean() > normal.mean() + 0.1
    inside = drawn(kind="logit_normal", low=0.5, high=0.9)
    assert inside.min() > 0.5 and inside.max() < 0.9


@every_family
def test_a_timestep_for_each_image_is_what_each_would_have_alone(name: str) -> None:
    policy, stepper, rollout = fresh(name)
    x, cond, guidance = rollout.trajectory.latents(), policy.encode(["a toxic sign"]).expand(4), MODELS[name].guidance
    times = torch.tensor([float(stepper.timesteps[i]) for i in (0, 1, 3, 3)])
    with torch.no_grad():
        for scale in (guidance, 1.0):
            one = policy.predict(x, float(times[1]), cond, scale)
            assert torch.equal(policy.predict(x, times[[1, 1, 1, 1]], cond, scale), one)
            mixed = policy.predict(x, times, cond, scale)
            torch.testing.assert_close(mixed[1], one[1], rtol=1e-4, atol=1e-5)
            assert not torch.allclose(mixed[0], one[0], rtol=1e-3, atol=1e-4)


@every_family
def test_the_forward_process_of_a_family_is_that_of_its_schedule(name: str) -> None:
    """Noised to a time of the sampler's own schedule, a perfect prediction steps to the image without noise."""
    policy, _, rollout = fresh(name)
    x0 = rollout.trajectory.latents().double()
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noised = policy.noising(x0, noise, np.full(len(x0), 0.6))
    if policy.family.component == "transformer":
        alone = noised.x_t - 0.6 * noised.target
        assert noised.timestep.tolist() == [np.float32(600.0)] * 4
    else:
        assert noised.timestep.tolist() == [600] * 4
        scheduler = DDIMScheduler.from_config(policy.family.pipeline.scheduler.config, clip_sample=False)
        scheduler.set_timesteps(scheduler.config.num_train_timesteps)
        alone = scheduler.step(noised.target, 600, noised.x_t).pred_original_sample
    torch.testing.assert_close(alone, x0, rtol=1e-5, atol=1e-5)


def test_a_trajectory_of_latents_has_images_and_no_trained_steps() -> None:
    latents = np.random.default_rng(0).normal(size=(3, 4, 8, 8)).astype(np.float32)
    trajectory = Trajectory.of_latents("a red circle", latents)
    assert (trajectory.group_size, trajectory.num_positions, trajectory.dtype) == (3, 0, "float32")
    assert np.array_equal(trajectory.latents().numpy(), latents)
    for bad in (latents[0], latents[:0]):
        with pytest.raises(ValueError, match=r"latents must be \[group_size, C, h, w\], got shape"):
            Trajectory.of_latents("a red circle", bad)
