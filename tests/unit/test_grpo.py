"""GRPO on a real (tiny) diffusion model: the ratio is 1 on fresh data, gradients and clipping are the textbook's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from diffusion.policy import DiffusionPolicy, LoRAConfig, ModelConfig
from diffusion.sampling import Rollout, SamplingConfig, TrainedStepsConfig, array_to_tensor, sample_rollout
from diffusion.steps import Stepper
from learner.grpo import GRPO, GRPOConfig, clipped_loss
from learner.objective import OBJECTIVES, build_objective
from raysteer.errors import ConfigError
from tests.tiny import tiny_pipeline

GUIDANCE = 5.0
CFG = SamplingConfig(steps=10, group_size=6, guidance_scale=GUIDANCE, trained=TrainedStepsConfig(mode="all"))
ADVANTAGES = np.array([1.0, -1.0, 0.5, -0.5, 2.0, -2.0], np.float32)


def moved(policy: DiffusionPolicy, scale: float, seed: int = 0) -> DiffusionPolicy:
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.trainable_parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return policy


def make(dtype: str = "float32", scale: float = 0.05) -> tuple[DiffusionPolicy, Stepper, Rollout]:
    config = ModelConfig.model_validate({"path": str(tiny_pipeline()), "dtype": dtype, "lora": LoRAConfig(rank=4)})
    policy = moved(DiffusionPolicy.load(config), scale)
    return policy, policy.stepper(CFG), sample_rollout(policy, "a toxic sign", range(6), CFG, step_seed=0)


@pytest.fixture(scope="module")
def fresh() -> tuple[DiffusionPolicy, Stepper, Rollout]:
    return make()


def gradient(policy: DiffusionPolicy, loss: torch.Tensor) -> torch.Tensor:
    grads = torch.autograd.grad(loss, policy.trainable_parameters())
    return torch.cat([g.flatten() for g in grads])


# ---- parity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_ratio_is_exactly_one_on_fresh_data_at_every_trained_step(dtype: str) -> None:
    policy, stepper, rollout = make(dtype)
    assert GRPO(GRPOConfig()).parity(policy, stepper, rollout.trajectory, GUIDANCE) == 0.0
    positions = range(rollout.trajectory.num_positions)
    _, stats = GRPO(GRPOConfig()).loss(policy, stepper, rollout.trajectory, ADVANTAGES, positions, GUIDANCE)
    assert stats["ratio_mean"] == 1.0  # with gradients on, too
    assert stats["ratio_max_dev"] == stats["clip_fraction"] == stats["approx_kl"] == 0.0


def test_a_policy_that_reloaded_the_adapter_replays_exactly(fresh: tuple[DiffusionPolicy, Stepper, Rollout]) -> None:
    sampler, stepper, rollout = fresh
    learner = DiffusionPolicy.load(sampler.config, adapter_seed=5)
    assert GRPO(GRPOConfig()).parity(learner, stepper, rollout.trajectory, GUIDANCE) > 1e-5
    learner.load_adapter(sampler.adapter_state())
    assert GRPO(GRPOConfig()).parity(learner, stepper, rollout.trajectory, GUIDANCE) == 0.0


def test_storing_other_latents_than_were_scored_breaks_parity(
    fresh: tuple[DiffusionPolicy, Stepper, Rollout],
) -> None:
    """The must-fail twin: latents scored in float32 and then rounded to bfloat16, as the published code does."""
    policy, stepper, rollout = fresh
    t = rollout.trajectory
    rounded = array_to_tensor(t.x_prev, t.dtype).bfloat16().float().numpy()
    deviation = GRPO(GRPOConfig()).parity(policy, stepper, replace(t, x_prev=rounded), GUIDANCE)
    assert deviation > 0.1 * GRPOConfig().clip_range  # what the parity gate refuses
    _, stats = GRPO(GRPOConfig()).loss(policy, stepper, replace(t, x_prev=rounded), ADVANTAGES, [8], GUIDANCE)
    assert stats["clip_fraction"] > 0.5


def test_another_guidance_scale_breaks_parity(fresh: tuple[DiffusionPolicy, Stepper, Rollout]) -> None:
    policy, stepper, rollout = fresh
    assert GRPO(GRPOConfig()).parity(policy, stepper, rollout.trajectory, GUIDANCE + 0.5) > 1e-5


def test_training_the_conditional_half_only_keeps_parity_within_the_gate(
    fresh: tuple[DiffusionPolicy, Stepper, Rollout],
) -> None:
    policy, stepper, rollout = fresh
    cfg = GRPOConfig(train_guidance="conditional")
    _, stats = GRPO(cfg).loss(policy, stepper, rollout.trajectory, ADVANTAGES, range(9), GUIDANCE)
    assert stats["ratio_max_dev"] < 0.1 * cfg.clip_range


# ---- gradients ---------------------------------------------------------------------------------------------


def test_the_first_gradient_is_the_policy_gradient(fresh: tuple[DiffusionPolicy, Stepper, Rollout]) -> None:
    policy, stepper, rollout = fresh
    objective, t = GRPO(GRPOConfig()), rollout.trajectory
    loss, _ = objective.loss(policy, stepper, t, ADVANTAGES, [2, 5], GUIDANCE)
    log_prob = torch.stack([objective._score(policy, stepper, t, k, GUIDANCE)[0] for k in (2, 5)])
    reinforce = -(torch.from_numpy(ADVANTAGES) * log_prob).mean()
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, reinforce), rtol=1e-4, atol=1e-8)


def test_the_gradient_agrees_with_a_finite_difference() -> None:
    policy, stepper, rollout = make()
    objective = GRPO(GRPOConfig(clip_range=0.9))

    def loss() -> torch.Tensor:
        return objective.loss(policy, stepper, rollout.trajectory, ADVANTAGES, [7], GUIDANCE)[0]

    grad = gradient(policy, loss())
    direction, h = grad / grad.norm(), 2e-3
    values = []
    start = torch.cat([p.data.flatten() for p in policy.trainable_parameters()])
    for sign in (1.0, -1.0):
        torch.nn.utils.vector_to_parameters(start + sign * h * direction, policy.trainable_parameters())
        values.append(loss().item())
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(grad.norm().item(), rel=0.02)


def test_a_step_down_the_loss_makes_good_images_likelier_and_bad_ones_less() -> None:
    policy, stepper, rollout = make()
    objective, t = GRPO(GRPOConfig()), rollout.trajectory
    loss, _ = objective.loss(policy, stepper, t, ADVANTAGES, range(9), GUIDANCE)
    grad = gradient(policy, loss)
    start = torch.cat([p.data.flatten() for p in policy.trainable_parameters()])
    torch.nn.utils.vector_to_parameters(start - 0.02 * grad / grad.norm(), policy.trainable_parameters())
    with torch.no_grad():
        new = torch.stack([objective._score(policy, stepper, t, k, GUIDANCE)[0] for k in range(9)])
    change = (new - torch.from_numpy(t.log_prob.T)).mean(0).numpy()
    assert (change * ADVANTAGES).mean() > 0


def test_equal_rewards_give_exactly_no_gradient(fresh: tuple[DiffusionPolicy, Stepper, Rollout]) -> None:
    policy, stepper, rollout = fresh
    objective = GRPO(GRPOConfig())
    advantages = objective.advantages(np.full((1, 6), 0.3))[0]
    loss, _ = objective.loss(policy, stepper, rollout.trajectory, advantages, [3], GUIDANCE)
    assert (gradient(policy, loss) == 0).all()


def test_steps_one_by_one_add_up_to_all_at_once(fresh: tuple[DiffusionPolicy, Stepper, Rollout]) -> None:
    policy, stepper, rollout = fresh
    objective, t = GRPO(GRPOConfig(kl_coef=0.1)), rollout.trajectory
    whole, stats = objective.loss(policy, stepper, t, ADVANTAGES, [0, 4, 8], GUIDANCE)
    parts = [objective.loss(policy, stepper, t, ADVANTAGES, [k], GUIDANCE) for k in (0, 4, 8)]
    assert whole.item() == pytest.approx(np.mean([loss.item() for loss, _ in parts]), abs=1e-7)
    assert stats["kl_ref"] == pytest.approx(np.mean([s["kl_ref"] for _, s in parts]), rel=1e-6)
    summed = sum(gradient(policy, loss / 3) for loss, _ in parts)
    assert isinstance(summed, torch.Tensor)
    torch.testing.assert_close(summed, gradient(policy, whole), rtol=1e-4, atol=1e-8)


def test_the_order_of_images_in_a_group_does_not_matter(fresh: tuple[DiffusionPolicy, Stepper, Rollout]) -> None:
    policy, stepper, rollout = fresh
    order, t = np.random.default_rng(0).permutation(6), rollout.trajectory
    shuffled = replace(t, x_t=t.x_t[order], x_prev=t.x_prev[order], log_prob=t.log_prob[order])
    objective = GRPO(GRPOConfig())
    a, _ = objective.loss(policy, stepper, t, ADVANTAGES, [1, 6], GUIDANCE)
    b, _ = objective.loss(policy, stepper, shuffled, ADVANTAGES[order], [1, 6], GUIDANCE)
    torch.testing.assert_close(gradient(policy, a), gradient(policy, b), rtol=1e-3, atol=1e-6)


# ---- clipping ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "passes"),
    [(1.0, 0.2, False), (1.0, -0.2, True), (-1.0, 0.2, True), (-1.0, -0.2, False)],
)
def test_only_moves_back_into_the_trust_region_have_a_gradient(
    advantage: float, log_ratio: float, passes: bool
) -> None:
    log_prob = torch.tensor([log_ratio], requires_grad=True)
    loss, stats = clipped_loss(log_prob, torch.zeros(1), torch.tensor([advantage]), 0.1)
    (grad,) = torch.autograd.grad(loss, log_prob)
    assert stats["clip_fraction"] == 1.0
    expected = -advantage * np.exp(log_ratio) if passes else 0.0
    assert grad.item() == pytest.approx(expected, abs=1e-6)


def test_stats_describe_the_ratios() -> None:
    new, old = torch.tensor([0.0, 0.1, -0.3, 0.0]), torch.zeros(4)
    _, stats = clipped_loss(new, old, torch.ones(4), 0.15)
    ratio = np.exp([0.0, 0.1, -0.3, 0.0])
    assert stats["ratio_mean"] == pytest.approx(ratio.mean())
    assert stats["ratio_max_dev"] == pytest.approx(np.abs(ratio - 1).max())
    assert stats["clip_fraction"] == 0.25
    assert stats["approx_kl"] == pytest.approx(0.5 * (0.01 + 0.09) / 4)


# ---- KL to the reference -----------------------------------------------------------------------------------


def test_kl_to_the_reference_is_zero_with_zero_gradient_at_the_start() -> None:
    policy, stepper, rollout = make(scale=0.0)
    loss, stats = GRPO(GRPOConfig(kl_coef=1.0)).loss(policy, stepper, rollout.trajectory, np.zeros(6), [0, 5], GUIDANCE)
    assert loss.item() == stats["kl_ref"] == 0.0
    assert (gradient(policy, loss) == 0).all()


def test_kl_to_the_reference_is_that_of_two_gaussians_and_pulls_back() -> None:
    policy, stepper, rollout = make()
    objective, t = GRPO(GRPOConfig(kl_coef=1.0)), rollout.trajectory
    loss, stats = objective.loss(policy, stepper, t, np.zeros(6), [4], GUIDANCE)
    with torch.no_grad():
        _, mean = objective._score(policy, stepper, t, 4, GUIDANCE)
        with policy.adapter_disabled():
            _, reference = objective._score(policy, stepper, t, 4, GUIDANCE)
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
    fresh: tuple[DiffusionPolicy, Stepper, Rollout],
) -> None:
    policy, stepper, rollout = fresh
    forwards: list[int] = []
    handle = policy.denoiser.register_forward_hook(lambda *_: forwards.append(1))
    try:
        GRPO(GRPOConfig()).loss(policy, stepper, rollout.trajectory, ADVANTAGES, [0], GUIDANCE)
    finally:
        handle.remove()
    assert len(forwards) == 1


# ---- the objective as a component --------------------------------------------------------------------------


def test_the_objective_normalises_as_configured() -> None:
    rewards = np.random.default_rng(0).normal(size=(3, 32))
    assert np.abs(GRPO(GRPOConfig(adv_clip=1.5)).advantages(rewards)).max() == np.float32(1.5)
    assert np.abs(GRPO(GRPOConfig(std_floor=100.0)).advantages(rewards)).max() < 0.1


def test_objectives_are_found_by_name() -> None:
    assert isinstance(build_objective(GRPOConfig()), GRPO)
    assert "grpo" in OBJECTIVES
    with pytest.raises(ConfigError, match=r"objective\.name: 'ppo' cannot be used; use one of: grpo"):
        build_objective(GRPOConfig().model_copy(update={"name": "ppo"}))


def test_misuse_is_a_bug_with_a_message(fresh: tuple[DiffusionPolicy, Stepper, Rollout]) -> None:
    policy, stepper, rollout = fresh
    with pytest.raises(ValueError, match="positions is empty"):
        GRPO(GRPOConfig()).loss(policy, stepper, rollout.trajectory, ADVANTAGES, [], GUIDANCE)
    with pytest.raises(ValueError, match=r"\(5,\) advantages for a group of 6"):
        GRPO(GRPOConfig()).loss(policy, stepper, rollout.trajectory, ADVANTAGES[:5], [0], GUIDANCE)


@pytest.mark.parametrize(
    "bad", [{"clip_range": 0.0}, {"adv_clip": 0.0}, {"kl_coef": -1.0}, {"std": "global"}, {"updates_per_batch": 0}]
)
def test_impossible_objective_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        GRPOConfig.model_validate(bad)
