"""The stochastic step: it is diffusers' DDIM, it has the published sigmas, and what is stored is what was scored."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

from diffusion.steps import DDIMEta, gaussian_log_prob
from raysteer.errors import ConfigError, ModelError

SD1 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(("steps", "alpha_to_one"), [(50, False), (10, True), (7, False)])
def test_every_step_equals_the_diffusers_ddim_step(
    prediction_type: str, eta: float, steps: int, alpha_to_one: bool
) -> None:
    config = SD1 | {"prediction_type": prediction_type, "set_alpha_to_one": alpha_to_one}
    scheduler = DDIMScheduler(**config)
    scheduler.set_timesteps(steps)
    stepper = DDIMEta.from_scheduler(scheduler.config, steps, eta)
    assert stepper.timesteps.tolist() == scheduler.timesteps.tolist()
    # diffusers' own code in float64: in float32 its sqrt(1 - a_p - sigma^2) loses digits at the last step (2e-5)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    x, output, noise = (randn(2, 4, 8, 8, seed=s) for s in range(3))
    for i, t in enumerate(scheduler.timesteps):
        variance_noise = noise.double() if eta else None
        theirs = scheduler.step(output.double(), int(t), x.double(), eta=eta, variance_noise=variance_noise).prev_sample
        ours = stepper.step(output, x, i, noise, torch.float32).x_prev
        assert torch.isfinite(ours).all()
        assert (ours - theirs).abs().max() <= 1e-6, i


def test_eta_one_is_the_ddpm_posterior_with_the_published_sigmas() -> None:
    stepper = DDIMEta.from_scheduler(SD1, 50, 1.0)
    alphas = DDIMScheduler(**SD1).alphas_cumprod.double().numpy()
    t = stepper.timesteps
    a_t, a_p = alphas[t], np.where(t >= 20, alphas[np.maximum(t - 20, 0)], alphas[0])
    posterior = (1 - a_p) / (1 - a_t) * (1 - a_t / a_p)
    np.testing.assert_allclose(stepper.sigmas**2, posterior, rtol=1e-5)
    sigma = dict(zip(t.tolist(), stepper.sigmas.tolist(), strict=True))
    assert [round(sigma[k], 4) for k in (981, 21, 1)] == [0.4545, 0.0395, 0.0206]


def test_sigma_scales_with_eta_and_the_mean_keeps_the_variance_budget() -> None:
    full, half = DDIMEta.from_scheduler(SD1, 20, 1.0), DDIMEta.from_scheduler(SD1, 20, 0.5)
    np.testing.assert_allclose(half.sigmas, full.sigmas / 2, rtol=1e-6)
    alphas = DDIMScheduler(**SD1).alphas_cumprod.double().numpy()
    eps = randn(1, 4, 8, 8).double()
    for stepper in (full, half):
        for i, t in enumerate(stepper.timesteps):
            a_p = alphas[t - 50] if t >= 50 else alphas[0]
            noise_kept = stepper.mean(eps, np.sqrt(1 - alphas[t]) * eps, i) / eps  # where x0 is 0
            np.testing.assert_allclose(noise_kept**2 + float(stepper.sigmas[i]) ** 2, 1 - a_p, rtol=1e-5)


@pytest.mark.parametrize("scheduler_class", [PNDMScheduler, EulerDiscreteScheduler])
def test_a_model_that_ships_with_another_scheduler_gets_the_same_steps(scheduler_class: type) -> None:
    accepted = inspect.signature(scheduler_class).parameters
    config = scheduler_class(
        **{key: value for key, value in SD1.items() if key in accepted}, timestep_spacing="leading"
    ).config
    assert "clip_sample" not in config  # DDIM's own default for it is on, and must not be fallen for
    stepper = DDIMEta.from_scheduler({**config, "set_alpha_to_one": False}, 50, 1.0)
    expected = DDIMEta.from_scheduler(SD1, 50, 1.0)
    assert np.array_equal(stepper.timesteps, expected.timesteps)
    assert np.array_equal(stepper.sigmas, expected.sigmas)


def test_log_prob_is_the_mean_of_a_normal_log_prob_in_float32() -> None:
    stepper = DDIMEta.from_scheduler(SD1, 50, 1.0)
    output, x_t, x_prev = (randn(3, 4, 8, 8, seed=s).bfloat16() for s in range(3))
    for i in (0, 20, 48):
        log_prob, mean = stepper.log_prob(output, x_t, x_prev, i)
        normal = torch.distributions.Normal(mean.double(), float(stepper.sigmas[i]))
        expected = normal.log_prob(x_prev.double()).flatten(1)
        assert log_prob.dtype == mean.dtype == torch.float32
        assert log_prob.shape == (3,)
        torch.testing.assert_close(log_prob.double(), expected.mean(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(log_prob.double() * 256, expected.sum(1), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scoring_the_stored_latent_returns_the_stored_log_prob_bit_for_bit(dtype: torch.dtype) -> None:
    stepper = DDIMEta.from_scheduler(SD1, 50, 1.0)
    x, output = randn(4, 4, 8, 8).to(dtype), randn(4, 4, 8, 8, seed=1).to(dtype)
    for i in range(50):
        step = stepper.step(output, x, i, randn(4, 4, 8, 8, seed=i), dtype)
        assert step.x_prev.dtype == dtype
        replayed, _ = stepper.log_prob(output, x, step.x_prev, i)
        assert step.log_prob is not None
        assert torch.equal(replayed, step.log_prob)


def test_scoring_before_rounding_to_bfloat16_clips_an_eighth_of_fresh_data() -> None:
    """The must-fail twin: the flaw of the published code, at its published size (13 % clipped, all of them at t=21)."""
    stepper = DDIMEta.from_scheduler(SD1, 50, 1.0)
    x, output = randn(16, 4, 64, 64), randn(16, 4, 64, 64, seed=1)
    clipped = {}
    for i in range(49):
        step = stepper.step(output, x, i, randn(16, 4, 64, 64, seed=2 + i), torch.float32)
        replayed, _ = stepper.log_prob(output, x, step.x_prev.bfloat16(), i)
        assert step.log_prob is not None
        ratio = torch.exp(replayed - step.log_prob)
        clipped[int(stepper.timesteps[i])] = ((ratio - 1).abs() > 1e-4).float().mean().item()
    assert clipped[21] == 1.0
    assert 0.05 < np.mean(list(clipped.values())) < 0.3


@pytest.mark.parametrize("eta", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("alpha_to_one", [False, True])
def test_no_step_at_any_eta_gives_a_nan_not_even_the_last(eta: float, alpha_to_one: bool) -> None:
    stepper = DDIMEta.from_scheduler(SD1 | {"set_alpha_to_one": alpha_to_one}, 50, eta)
    assert stepper.timesteps[-1] == 1
    assert np.isfinite(stepper.sigmas).all()
    x, noise = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=2)
    for i in range(50):
        output = randn(2, 4, 8, 8, seed=1).requires_grad_()
        step = stepper.step(output, x, i, noise, torch.float32)
        scored = step.mean.sum() if step.log_prob is None else stepper.log_prob(output, x, step.x_prev, i)[0].sum()
        (gradient,) = torch.autograd.grad(scored, output)
        assert (step.log_prob is None) == (stepper.sigmas[i] == 0.0)
        assert all(torch.isfinite(values).all() for values in (step.x_prev, step.mean, scored, gradient)), i
    assert (stepper.sigmas[-1] == 0.0) == (eta == 0.0 or alpha_to_one)


def test_a_step_without_noise_is_taken_but_never_scored() -> None:
    stepper = DDIMEta.from_scheduler(SD1, 10, 0.0)
    x = randn(2, 4, 8, 8)
    step = stepper.step(x, x, 9, None, torch.float32)
    assert step.log_prob is None
    assert torch.isfinite(step.x_prev).all()
    with pytest.raises(ValueError, match="deterministic"):
        stepper.log_prob(x, x, x, 9)
    with pytest.raises(ValueError, match="needs noise"):
        DDIMEta.from_scheduler(SD1, 10, 1.0).step(x, x, 0, None, torch.float32)


def test_mean_and_log_prob_pass_gradients_to_the_model_output_only_through_the_mean() -> None:
    stepper = DDIMEta.from_scheduler(SD1, 10, 1.0)
    output = randn(2, 4, 8, 8).requires_grad_()
    x_t, x_prev = randn(2, 4, 8, 8, seed=1), randn(2, 4, 8, 8, seed=2)
    log_prob, mean = stepper.log_prob(output, x_t, x_prev, 3)
    log_prob.sum().backward()
    sigma = float(stepper.sigmas[3])
    d_mean = stepper.mean(torch.ones(1), torch.zeros(1), 3)
    torch.testing.assert_close(output.grad, (x_prev - mean) / sigma**2 / 256 * d_mean)


@pytest.mark.parametrize(
    ("given", "computed"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_steps_are_computed_in_float32_or_wider(given: torch.dtype, computed: torch.dtype) -> None:
    stepper = DDIMEta.from_scheduler(SD1, 10, 1.0)
    x, output, noise = (randn(2, 4, 8, 8, seed=s).to(given) for s in range(3))
    step = stepper.step(output, x, 3, noise, given)
    assert step.x_prev.dtype == given
    assert step.log_prob is not None
    log_prob, mean = stepper.log_prob(output, x, step.x_prev, 3)
    assert step.mean.dtype == mean.dtype == step.log_prob.dtype == log_prob.dtype == computed
    assert torch.equal(log_prob, step.log_prob)


def test_group_log_probs_are_per_image() -> None:
    mean, x = torch.zeros(3, 4, 8, 8), randn(3, 4, 8, 8)
    together = gaussian_log_prob(x, mean, 0.3)
    alone = torch.cat([gaussian_log_prob(x[k : k + 1], mean[k : k + 1], 0.3) for k in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [0, 1001])
def test_more_steps_than_the_model_was_trained_on_are_refused_by_key(steps: int) -> None:
    with pytest.raises(ConfigError, match=r"sampling\.steps: .*use 1 to 1000"):
        DDIMEta.from_scheduler(SD1, steps, 1.0)


def test_a_step_for_every_training_timestep_is_refused_where_the_offset_leaves_the_schedule() -> None:
    assert DDIMEta.from_scheduler(SD1 | {"steps_offset": 0}, 1000, 1.0).timesteps[0] == 999
    assert DDIMEta.from_scheduler(SD1, 999, 1.0).timesteps[0] == 999
    with pytest.raises(ConfigError, match=r"sampling\.steps: 1000 cannot be used; use 1 to 999"):
        DDIMEta.from_scheduler(SD1, 1000, 1.0)


def test_eta_outside_zero_to_one_is_refused_by_key() -> None:
    with pytest.raises(ConfigError, match=r"sampling\.eta"):
        DDIMEta.from_scheduler(SD1, 10, 1.5)


@pytest.mark.parametrize("key", ["clip_sample", "thresholding"])
def test_a_scheduler_that_clips_predictions_has_no_density_and_is_refused(key: str) -> None:
    with pytest.raises(ModelError, match=key):
        DDIMEta.from_scheduler(SD1 | {key: True}, 10, 1.0)


def test_zero_terminal_snr_works_for_v_prediction_and_is_refused_for_epsilon() -> None:
    config = SD1 | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    stepper = DDIMEta.from_scheduler(config | {"prediction_type": "v_prediction"}, 10, 1.0)
    x = randn(1, 4, 8, 8)
    assert torch.isfinite(stepper.step(x, x, 0, x, torch.float32).x_prev).all()
    with pytest.raises(ModelError, match="epsilon prediction is undefined"):
        DDIMEta.from_scheduler(config | {"prediction_type": "epsilon"}, 10, 1.0)
