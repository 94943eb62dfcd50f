"""The KL to the reference, the base model under the adapter: its size, its zero, its pull."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from diffusion.sampling import SamplingConfig, TrainedStepsConfig
from diffusion.steps import gaussian_log_prob
from learner.grpo import GRPO, GRPOConfig
from learner.replay import replay
from tests.policies import GUIDANCE, Drawn, drawn, gradient, restored
from tests.tiny import tiny_pipeline

CFG = SamplingConfig(steps=10, group_size=6, guidance_scale=GUIDANCE, trained=TrainedStepsConfig(mode="all"))


@pytest.fixture
def fresh() -> Iterator[Drawn]:
    """A group just drawn, with an adapter that a test may move."""
    with restored(drawn(tiny_pipeline(), CFG)) as made:
        yield made


@torch.no_grad()
def both_means(made: Drawn, position: int) -> list[torch.Tensor]:
    """[mean of the policy, mean of the reference]."""
    policy, stepper, rollout = made
    mean = replay(policy, stepper, rollout.trajectory, position, GUIDANCE)[1]
    with policy.adapter_disabled():
        return [mean, replay(policy, stepper, rollout.trajectory, position, GUIDANCE)[1]]


def test_kl_from_the_means_is_minus_the_expected_log_ratio(fresh: Drawn) -> None:
    """Monte Carlo over the noise; a missing half, a sum for a mean or a wrong sigma would be dozens of errors away."""
    policy, stepper, rollout = fresh
    t, position = rollout.trajectory, 6
    _, stats = GRPO(GRPOConfig(kl_coef=1.0)).loss(policy, stepper, t, np.zeros(6), [position], GUIDANCE)
    mean, reference = both_means(fresh, position)
    sigma, repeats = float(stepper.sigmas[int(t.step_index[position])]), 2000
    noise = torch.randn((repeats, *mean.shape), generator=torch.Generator().manual_seed(0))
    x, many = (mean + sigma * noise).flatten(0, 1), (repeats, 1, 1, 1)
    log_ratio = gaussian_log_prob(x, reference.repeat(many), sigma) - gaussian_log_prob(x, mean.repeat(many), sigma)
    estimate, error = -log_ratio.mean().item(), log_ratio.std().item() / len(log_ratio) ** 0.5
    assert error < 0.02 * estimate
    assert abs(stats["kl_ref"] - estimate) < 3 * error


def test_kl_to_the_reference_is_zero_when_the_adapter_is_disabled(fresh: Drawn) -> None:
    policy, stepper, rollout = fresh
    objective = GRPO(GRPOConfig(kl_coef=1.0))
    with policy.adapter_disabled():
        _, stats = objective.loss(policy, stepper, rollout.trajectory, np.zeros(6), [0, 5], GUIDANCE)
    assert stats["kl_ref"] == 0.0
    _, stats = objective.loss(policy, stepper, rollout.trajectory, np.zeros(6), [0, 5], GUIDANCE)
    assert stats["kl_ref"] > 1e-3


def test_kl_to_the_reference_is_zero_with_zero_gradient_at_the_start() -> None:
    policy, stepper, rollout = drawn(tiny_pipeline(), CFG, scale=0.0)
    loss, stats = GRPO(GRPOConfig(kl_coef=1.0)).loss(policy, stepper, rollout.trajectory, np.zeros(6), [0, 5], GUIDANCE)
    assert loss.item() == stats["kl_ref"] == 0.0
    assert (gradient(policy, loss) == 0).all()


def test_kl_to_the_reference_is_that_of_two_gaussians_and_pulls_back(fresh: Drawn) -> None:
    policy, stepper, rollout = fresh
    objective, t = GRPO(GRPOConfig(kl_coef=1.0)), rollout.trajectory
    loss, stats = objective.loss(policy, stepper, t, np.zeros(6), [4], GUIDANCE)
    mean, reference = both_means(fresh, 4)
    sigma = torch.full_like(mean, float(stepper.sigmas[4]))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, sigma), normal(reference, sigma)).mean().item()
    assert stats["kl_ref"] == pytest.approx(expected, rel=1e-4)
    assert expected > 0
    grad = gradient(policy, loss)
    start = torch.cat([p.data.flatten() for p in policy.trainable_parameters()])
    torch.nn.utils.vector_to_parameters(start - 0.05 * grad / grad.norm(), policy.trainable_parameters())
    assert objective.loss(policy, stepper, t, np.zeros(6), [4], GUIDANCE)[1]["kl_ref"] < expected


def test_without_a_kl_term_the_reference_is_never_computed(
    fresh: Drawn,
) -> None:
    policy, stepper, rollout = fresh
    forwards: list[int] = []
    handle = policy.denoiser.register_forward_hook(lambda *_: forwards.append(1))
    try:
        GRPO(GRPOConfig()).loss(policy, stepper, rollout.trajectory, np.zeros(6), [0], GUIDANCE)
    finally:
        handle.remove()
    assert len(forwards) == 1
