"""The surrogate losses of one step: clipping, masking, weighing, guarding; on numbers and on every noise schedule."""

import math

import numpy as np
import pytest
import torch

from diffusion.flow_steps import ConstantEta, FlowCPS, FlowSDE
from diffusion.steps import DDIMEta, LinearGaussian
from learner.surrogates import (
    behaviour_weight,
    clipped_loss,
    guarded_log_ratio,
    masked_loss,
    output_gain,
    step_kl,
)
from raysteer.errors import ConfigError

TIMES = np.array([1.0, 0.94, 0.86, 0.72, 0.5, 0.2, 0.0])  # shifted: steps of unequal length
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
SHAPE = (4, 6, 6)


def steppers() -> dict[str, LinearGaussian]:
    return {
        "ddim": DDIMEta.from_scheduler(SCHEDULER, 6, 1.0),
        "v-prediction": DDIMEta.from_scheduler(SCHEDULER | {"prediction_type": "v_prediction"}, 6, 0.7),
        "flow-sde": FlowSDE(TIMES, 0.7),
        "constant": ConstantEta(TIMES, 0.3),
        "cps": FlowCPS(TIMES, 0.8),
    }


QUADRANTS = [(1.0, 0.2, False), (1.0, -0.2, True), (-1.0, 0.2, True), (-1.0, -0.2, False)]


# ---- clipping ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("advantage", "log_ratio", "passes"), QUADRANTS)
def test_only_moves_back_into_the_trust_region_have_a_gradient(
    advantage: float, log_ratio: float, passes: bool
) -> None:
    moved = torch.tensor([log_ratio], requires_grad=True)
    loss, stats = clipped_loss(moved, torch.tensor([advantage]), 0.1)
    (grad,) = torch.autograd.grad(loss, moved)
    assert stats["clip_fraction"] == 1.0
    expected = -advantage * np.exp(log_ratio) if passes else 0.0
    assert grad.item() == pytest.approx(expected, abs=1e-6)


def test_stats_describe_the_ratios() -> None:
    _, stats = clipped_loss(torch.tensor([0.0, 0.1, -0.3, 0.0]), torch.ones(4), 0.15)
    ratio = np.exp([0.0, 0.1, -0.3, 0.0])
    assert stats["ratio_mean"] == pytest.approx(ratio.mean())
    assert stats["ratio_max_dev"] == pytest.approx(np.abs(ratio - 1).max())
    assert stats["clip_fraction"] == 0.25
    assert stats["approx_kl"] == pytest.approx(0.5 * (0.01 + 0.09) / 4)


# ---- decoupled PPO -------------------------------------------------------------------------------------------


def test_the_weight_of_stale_images_is_capped_and_has_no_gradient() -> None:
    anchor, behaviour = torch.tensor([0.0, 1.0, 3.0, 200.0], requires_grad=True), torch.zeros(4)
    weight, stats = behaviour_weight(anchor, behaviour, 5.0)
    assert not weight.requires_grad
    torch.testing.assert_close(weight, torch.tensor([1.0, math.e, 5.0, 5.0]))
    assert stats == {"weight_mean": pytest.approx(weight.mean().item()), "weight_capped": 0.5}
    loose, stats = behaviour_weight(anchor, behaviour, 1e6)
    assert loose.max() > 5.0 and stats["weight_capped"] == 0.25  # the must-fail twin: the cap did it


def test_a_weight_scales_the_loss_of_its_image_only() -> None:
    log_ratio, advantages = torch.tensor([0.02, -0.01, 0.3]), torch.tensor([1.0, -2.0, 0.5])
    each = torch.stack([clipped_loss(log_ratio[k : k + 1], advantages[k : k + 1], 0.1)[0] for k in range(3)])
    weight = torch.tensor([0.5, 2.0, 1.0])
    loss, _ = clipped_loss(log_ratio, advantages, 0.1, weight)
    torch.testing.assert_close(loss, (weight * each).mean())
    assert clipped_loss(log_ratio, advantages, 0.1, torch.ones(3))[0] == clipped_loss(log_ratio, advantages, 0.1)[0]


# ---- the KL mask ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("advantage", "log_ratio", "passes"), QUADRANTS)
def test_the_mask_drops_an_image_that_has_gone_far_and_goes_on(
    advantage: float, log_ratio: float, passes: bool
) -> None:
    moved = torch.tensor([log_ratio], requires_grad=True)
    loss, stats = masked_loss(moved, torch.tensor([advantage]), torch.tensor([2e-5]), 1e-5)
    (grad,) = torch.autograd.grad(loss, moved)
    assert stats["mask_fraction"] == (0.0 if passes else 1.0)
    assert grad.item() == pytest.approx(-advantage * np.exp(log_ratio) if passes else 0.0, abs=1e-6)
    near, stats = masked_loss(moved, torch.tensor([advantage]), torch.tensor([0.9e-5]), 1e-5)
    assert stats["mask_fraction"] == 0.0 and near.item() != 0.0  # it has not gone far: whatever its way


def test_a_mask_without_bound_is_the_unclipped_surrogate_and_one_with_a_bound_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    log_ratio, advantages = (torch.randn(64, generator=generator) for _ in range(2))
    kl = torch.rand(64, generator=generator)
    unclipped = (-advantages * torch.exp(log_ratio)).mean()
    loss, stats = masked_loss(log_ratio, advantages, kl, math.inf)
    assert loss == unclipped and stats["mask_fraction"] == 0.0
    loss, stats = masked_loss(log_ratio, advantages, kl, 0.5)
    assert abs(loss - unclipped) > 0.1 and 0.1 < stats["mask_fraction"] < 0.5
    assert stats["kl_anchor"] == pytest.approx(kl.mean().item())


def test_an_anchor_that_is_the_policy_masks_nothing_however_low_the_threshold() -> None:
    mean = torch.randn(5, *SHAPE)
    kl = step_kl(mean, mean.clone(), 0.1)
    assert (kl == 0.0).all()
    advantages = torch.tensor([2.0, -1.0, 0.5, -0.5, -1.0])
    loss, stats = masked_loss(torch.zeros(5), advantages, kl, 1e-30)
    assert stats["mask_fraction"] == 0.0
    assert loss == -advantages.mean()


# ---- every noise schedule ------------------------------------------------------------------------------------


def two_policies(stepper: LinearGaussian, i: int, repeats: int) -> tuple[torch.Tensor, ...]:
    """(mean, anchor's mean, x_prev drawn by the anchor, log-ratio): one latent, ``repeats`` draws, float64."""
    generator = torch.Generator().manual_seed(i)
    x_t, out, change = (torch.randn(1, *SHAPE, generator=generator, dtype=torch.float64) for _ in range(3))
    x_t, out = x_t.expand(repeats, *SHAPE), out.expand(repeats, *SHAPE)
    new = out + change
    noise = torch.randn(repeats, *SHAPE, generator=generator, dtype=torch.float64)
    drawn = stepper.step(out, x_t, i, noise, torch.float64)
    log_prob, mean = stepper.log_prob(new, x_t, drawn.x_prev, i)
    assert drawn.log_prob is not None
    return mean, drawn.mean, drawn.x_prev, log_prob - drawn.log_prob


@pytest.mark.parametrize("kind", steppers())
def test_the_guarded_log_ratio_of_the_anchors_own_images_has_mean_zero_and_the_plain_one_has_not(kind: str) -> None:
    stepper = steppers()[kind]
    for i in (0, 2, 4):
        sigma = float(stepper.sigmas[i])
        mean, anchor, x_prev, log_ratio = two_policies(stepper, i, 4000)
        kl = step_kl(mean, anchor, sigma)
        guarded = guarded_log_ratio(mean, anchor, x_prev, sigma)
        assert abs(guarded.mean()) < 4 * guarded.std() / len(guarded) ** 0.5
        error = log_ratio.std() / len(log_ratio) ** 0.5
        assert log_ratio.mean() < -10 * error  # the must-fail twin: ratios lie left of 1
        tempering = 2 * sigma**2 if kind == "cps" else 1.0  # what the density of CPS leaves out
        assert abs(log_ratio.mean() / tempering + kl[0]) < 4 * error / tempering, "-KL is the mean of the plain one"
        torch.testing.assert_close(guarded, sigma * (log_ratio / tempering + kl), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", steppers())
def test_a_guarded_step_pulls_equally_on_the_model_output_at_every_noise(kind: str) -> None:
    stepper = steppers()[kind]
    noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    guarded_pulls, plain_pulls = [], []
    for i in range(stepper.num_steps):
        if stepper.sigmas[i] == 0.0:
            continue
        x_t, out = torch.zeros(1, *SHAPE), torch.zeros(1, *SHAPE, requires_grad=True)
        x_prev = stepper.step(out.detach(), x_t, i, noise, torch.float32).x_prev
        log_prob, mean = stepper.log_prob(out, x_t, x_prev, i)
        log_ratio = guarded_log_ratio(mean, mean.detach(), x_prev, float(stepper.sigmas[i]))
        (pull,) = torch.autograd.grad(log_ratio.sum() / output_gain(stepper, i), out, retain_graph=True)
        torch.testing.assert_close(pull.abs(), noise.abs() / noise.numel(), rtol=1e-3, atol=1e-7)
        guarded_pulls.append(pull.norm().item())
        plain_pulls.append(torch.autograd.grad(log_prob.sum(), out)[0].norm().item())
    assert len(guarded_pulls) >= 5
    assert max(guarded_pulls) < 1.001 * min(guarded_pulls)
    assert max(plain_pulls) > 1.5 * min(plain_pulls)


def test_under_flow_grpo_noise_the_gain_is_the_time_step_up_to_a_constant() -> None:
    gains = np.array([output_gain(FlowSDE(TIMES, 0.7), i) for i in range(6)])
    time_steps = -np.diff(TIMES)
    assert gains[0] == pytest.approx(time_steps[0])  # at t = 1 the drift has no part in v
    np.testing.assert_allclose(gains[1:] / time_steps[1:], 1 + 0.7**2 / 2, rtol=1e-6)


def test_a_step_that_ignores_the_model_has_no_gain() -> None:
    one = np.ones(1)
    with pytest.raises(ConfigError, match=r"objective\.ratio.*step 0 ignores the model output"):
        output_gain(LinearGaussian(one, one, one, 0 * one), 0)


def test_the_kl_of_a_step_is_that_of_two_gaussians_per_dimension() -> None:
    mean, anchor = torch.randn(3, *SHAPE), torch.randn(3, *SHAPE)
    normal = torch.distributions.Normal
    sigma = torch.full_like(mean, 0.3)
    expected = torch.distributions.kl_divergence(normal(mean, sigma), normal(anchor, sigma)).flatten(1).mean(1)
    torch.testing.assert_close(step_kl(mean, anchor, 0.3), expected)
