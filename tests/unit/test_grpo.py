"""GRPO on a real (tiny) diffusion model: the ratio is 1 on fresh data, gradients and clipping are the textbook's."""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from diffusion.policy import DiffusionPolicy, LoRAConfig, ModelConfig
from diffusion.sampling import Rollout, SamplingConfig, TrainedStepsConfig, Trajectory, array_to_tensor, sample_rollout
from diffusion.steps import Stepper, gaussian_log_prob
from learner.batches import share
from learner.grpo import GRPO, GRPOConfig, clipped_loss
from learner.objective import OBJECTIVES, build_objective
from raysteer.errors import ConfigError
from tests.tiny import tiny_pipeline

GUIDANCE = 5.0
CFG = SamplingConfig(steps=10, group_size=6, guidance_scale=GUIDANCE, trained=TrainedStepsConfig(mode="all"))
ADVANTAGES = np.array([1.0, -1.0, 0.5, -0.5, 2.0, -2.0], np.float32)
POSITIONS = [2, 7]


def moved(policy: DiffusionPolicy, scale: float, seed: int = 0) -> DiffusionPolicy:
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.trainable_parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return policy


Fresh = tuple[DiffusionPolicy, Stepper, Rollout]
Exact = tuple[DiffusionPolicy, Stepper, Trajectory]  # in float64


@functools.cache
def make(dtype: str = "float32", scale: float = 0.05) -> Fresh:
    """A policy ``scale`` away from its base model, and a group it has just drawn. Shared, see ``fresh``."""
    config = ModelConfig.model_validate({"path": str(tiny_pipeline()), "dtype": dtype, "lora": LoRAConfig(rank=4)})
    policy = moved(DiffusionPolicy.load(config), scale)
    return policy, policy.stepper(CFG), sample_rollout(policy, "a toxic sign", range(6), CFG, step_seed=0)


@pytest.fixture
def fresh() -> Iterator[Fresh]:
    """``make()`` with an adapter that a test may move."""
    made = make()
    state = made[0].adapter_state()
    yield made
    made[0].load_adapter(state)


@pytest.fixture(scope="module")
def exact() -> Exact:
    """The same policy and group in float64, denoiser and adapter: old log-probs are those of this very policy."""
    sampler, stepper, rollout = make()
    policy = DiffusionPolicy.load(sampler.config)
    policy.load_adapter(sampler.adapter_state())
    policy.denoiser.double()
    policy.dtype = torch.float64
    t = rollout.trajectory
    t = replace(t, x_t=t.x_t.astype(np.float64), x_prev=t.x_prev.astype(np.float64), dtype="float64")
    return policy, stepper, replace(t, log_prob=score(policy, stepper, t, range(t.num_positions)).numpy().T.copy())


@torch.no_grad()
def score(policy: DiffusionPolicy, stepper: Stepper, t: Trajectory, positions: Iterable[int]) -> torch.Tensor:
    """Log-probs [positions, G] under this policy."""
    return torch.stack([GRPO(GRPOConfig())._score(policy, stepper, t, k, GUIDANCE)[0] for k in positions])


def gradient(policy: DiffusionPolicy, loss: torch.Tensor) -> torch.Tensor:
    grads = torch.autograd.grad(loss, policy.trainable_parameters())
    return torch.cat([g.flatten() for g in grads])


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Length of ``a - b`` relative to that of ``a``."""
    return ((a - b).norm() / a.norm()).item()


# ---- parity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_ratio_is_exactly_one_on_fresh_data_at_every_trained_step(dtype: str) -> None:
    policy, stepper, rollout = make(dtype)
    assert GRPO(GRPOConfig()).parity(policy, stepper, rollout.trajectory, GUIDANCE) == 0.0
    positions = range(rollout.trajectory.num_positions)
    _, stats = GRPO(GRPOConfig()).loss(policy, stepper, rollout.trajectory, ADVANTAGES, positions, GUIDANCE)
    assert stats["ratio_mean"] == 1.0  # with gradients on, too
    assert stats["ratio_max_dev"] == stats["clip_fraction"] == stats["approx_kl"] == 0.0


def test_a_policy_that_reloaded_the_adapter_replays_exactly(fresh: Fresh) -> None:
    sampler, stepper, rollout = fresh
    learner = DiffusionPolicy.load(sampler.config, adapter_seed=5)
    assert GRPO(GRPOConfig()).parity(learner, stepper, rollout.trajectory, GUIDANCE) > 1e-5
    learner.load_adapter(sampler.adapter_state())
    assert GRPO(GRPOConfig()).parity(learner, stepper, rollout.trajectory, GUIDANCE) == 0.0


def test_storing_other_latents_than_were_scored_breaks_parity(
    fresh: Fresh,
) -> None:
    """The must-fail twin: latents scored in float32 and then rounded to bfloat16, as the published code does."""
    policy, stepper, rollout = fresh
    t = rollout.trajectory
    rounded = array_to_tensor(t.x_prev, t.dtype).bfloat16().float().numpy()
    deviation = GRPO(GRPOConfig()).parity(policy, stepper, replace(t, x_prev=rounded), GUIDANCE)
    assert deviation > 0.1 * GRPOConfig().clip_range  # what the parity gate refuses
    _, stats = GRPO(GRPOConfig()).loss(policy, stepper, replace(t, x_prev=rounded), ADVANTAGES, [8], GUIDANCE)
    assert stats["clip_fraction"] > 0.5


def test_another_guidance_scale_breaks_parity(fresh: Fresh) -> None:
    policy, stepper, rollout = fresh
    assert GRPO(GRPOConfig()).parity(policy, stepper, rollout.trajectory, GUIDANCE + 0.5) > 1e-5


def test_training_the_conditional_half_only_keeps_parity_within_the_gate(
    fresh: Fresh,
) -> None:
    policy, stepper, rollout = fresh
    cfg = GRPOConfig(train_guidance="conditional")
    _, stats = GRPO(cfg).loss(policy, stepper, rollout.trajectory, ADVANTAGES, range(9), GUIDANCE)
    assert stats["ratio_max_dev"] < 0.1 * cfg.clip_range


# ---- gradients ---------------------------------------------------------------------------------------------


def test_the_first_gradient_is_the_policy_gradient(fresh: Fresh) -> None:
    policy, stepper, rollout = fresh
    objective, t = GRPO(GRPOConfig()), rollout.trajectory
    loss, _ = objective.loss(policy, stepper, t, ADVANTAGES, [2, 5], GUIDANCE)
    log_prob = torch.stack([objective._score(policy, stepper, t, k, GUIDANCE)[0] for k in (2, 5)])
    reinforce = -(torch.from_numpy(ADVANTAGES) * log_prob).mean()
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, reinforce), rtol=1e-4, atol=1e-8)


@pytest.fixture(scope="module")
def finite_differences(exact: Exact) -> dict[int, float]:
    """Central differences of -mean(A log_prob), the policy gradient that knows neither ratio nor clipping, by entry of
    the flattened adapter: five random parameters.
    """
    policy, stepper, t = exact
    parameters, h = policy.trainable_parameters(), 1e-4
    start = torch.cat([p.data.flatten() for p in parameters])
    found = {}
    for entry in np.random.default_rng(0).choice(len(start), 5, replace=False).tolist():
        values = []
        for sign in (1.0, -1.0):
            moved_one = start.clone()
            moved_one[entry] += sign * h
            torch.nn.utils.vector_to_parameters(moved_one, parameters)
            values.append(-(torch.from_numpy(ADVANTAGES) * score(policy, stepper, t, POSITIONS)).mean().item())
        found[entry] = (values[0] - values[1]) / (2 * h)
    torch.nn.utils.vector_to_parameters(start, parameters)
    return found


def largest_error(grad: torch.Tensor, finite_differences: dict[int, float]) -> float:
    return max(abs(grad[entry].item() / value - 1.0) for entry, value in finite_differences.items())


def test_the_first_gradient_agrees_with_finite_differences_in_float64(
    exact: Exact, finite_differences: dict[int, float]
) -> None:
    policy, stepper, t = exact
    loss, stats = GRPO(GRPOConfig()).loss(policy, stepper, t, ADVANTAGES, POSITIONS, GUIDANCE)
    assert loss.dtype == torch.float64
    assert stats["ratio_max_dev"] == 0.0
    assert largest_error(gradient(policy, loss), finite_differences) < 1e-6


def test_finite_differences_catch_a_wrong_sign_and_a_stale_old_log_prob(
    exact: Exact, finite_differences: dict[int, float]
) -> None:
    """The must-fail twins of the test above, against the 1e-4 that it promises."""
    policy, stepper, t = exact
    objective = GRPO(GRPOConfig())
    wrong_sign, _ = objective.loss(policy, stepper, t, -ADVANTAGES, POSITIONS, GUIDANCE)
    assert largest_error(gradient(policy, wrong_sign), finite_differences) > 1.0
    with policy.adapter_disabled():
        stale = score(policy, stepper, t, range(t.num_positions)).numpy().T
    for clip_range in (1e-4, 0.9):  # some images clipped; none clipped, but weighed by a ratio that is not 1
        objective = GRPO(GRPOConfig(clip_range=clip_range))
        loss, _ = objective.loss(policy, stepper, replace(t, log_prob=stale), ADVANTAGES, POSITIONS, GUIDANCE)
        assert largest_error(gradient(policy, loss), finite_differences) > 1e-3


def test_a_step_down_the_loss_makes_good_images_likelier_and_bad_ones_less(fresh: Fresh) -> None:
    policy, stepper, rollout = fresh
    objective, t = GRPO(GRPOConfig()), rollout.trajectory
    loss, _ = objective.loss(policy, stepper, t, ADVANTAGES, range(9), GUIDANCE)
    grad = gradient(policy, loss)
    start = torch.cat([p.data.flatten() for p in policy.trainable_parameters()])
    torch.nn.utils.vector_to_parameters(start - 0.02 * grad / grad.norm(), policy.trainable_parameters())
    new = score(policy, stepper, t, range(9))
    change = (new - torch.from_numpy(t.log_prob.T)).mean(0).numpy()
    assert (change * ADVANTAGES).mean() > 0


def test_equal_rewards_give_exactly_no_gradient(fresh: Fresh) -> None:
    policy, stepper, rollout = fresh
    objective = GRPO(GRPOConfig())
    advantages = objective.advantages(np.full((1, 6), 0.3))[0]
    loss, _ = objective.loss(policy, stepper, rollout.trajectory, advantages, [3], GUIDANCE)
    assert (gradient(policy, loss) == 0).all()


def test_steps_one_by_one_add_up_to_all_at_once(fresh: Fresh) -> None:
    policy, stepper, rollout = fresh
    objective, t = GRPO(GRPOConfig(kl_coef=0.1)), rollout.trajectory
    whole, stats = objective.loss(policy, stepper, t, ADVANTAGES, [0, 4, 8], GUIDANCE)
    parts = [objective.loss(policy, stepper, t, ADVANTAGES, [k], GUIDANCE) for k in (0, 4, 8)]
    assert whole.item() == pytest.approx(np.mean([loss.item() for loss, _ in parts]), abs=1e-7)
    assert stats["kl_ref"] == pytest.approx(np.mean([s["kl_ref"] for _, s in parts]), rel=1e-6)
    summed = sum(gradient(policy, loss / 3) for loss, _ in parts)
    assert isinstance(summed, torch.Tensor)
    torch.testing.assert_close(summed, gradient(policy, whole), rtol=1e-4, atol=1e-8)


def test_the_order_of_images_in_a_group_does_not_matter(fresh: Fresh) -> None:
    policy, stepper, rollout = fresh
    order, t = np.random.default_rng(0).permutation(6), rollout.trajectory
    shuffled = replace(t, x_t=t.x_t[order], x_prev=t.x_prev[order], log_prob=t.log_prob[order])
    objective = GRPO(GRPOConfig())
    a, _ = objective.loss(policy, stepper, t, ADVANTAGES, [1, 6], GUIDANCE)
    b, _ = objective.loss(policy, stepper, shuffled, ADVANTAGES[order], [1, 6], GUIDANCE)
    assert a.item() == pytest.approx(b.item(), abs=1e-6)
    assert difference(gradient(policy, a), gradient(policy, b)) <= 1e-5


def test_splitting_a_group_into_micro_batches_changes_neither_loss_nor_gradient(fresh: Fresh) -> None:
    policy, stepper, rollout = fresh
    objective, t = GRPO(GRPOConfig(kl_coef=0.1)), rollout.trajectory
    whole, _ = objective.loss(policy, stepper, t, ADVANTAGES, POSITIONS, GUIDANCE)
    loss, grad = 0.0, torch.zeros(len(gradient(policy, whole)))
    for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
        few = replace(t, x_t=t.x_t[part], x_prev=t.x_prev[part], log_prob=t.log_prob[part])
        partial, _ = objective.loss(policy, stepper, few, ADVANTAGES[part], POSITIONS, GUIDANCE)
        loss, grad = loss + partial.item() / 3, grad + gradient(policy, partial / 3)
    whole, _ = objective.loss(policy, stepper, t, ADVANTAGES, POSITIONS, GUIDANCE)
    assert loss == pytest.approx(whole.item(), abs=1e-6)
    assert difference(grad, gradient(policy, whole)) <= 1e-5


def test_the_number_of_ranks_does_not_change_the_gradient(fresh: Fresh) -> None:
    """As the learner does it: a rank weighs its share of the groups by the whole batch, and ranks are summed."""
    policy, _, _ = fresh
    cfg = CFG.model_copy(update={"steps": 4, "group_size": 3})
    stepper = policy.stepper(cfg)
    prompts = ("a toxic sign", "a red circle", "a house", "a cat")
    groups = [
        sample_rollout(policy, prompt, range(3 * n, 3 * n + 3), cfg, step_seed=n).trajectory
        for n, prompt in enumerate(prompts)
    ]
    objective = GRPO(GRPOConfig())
    advantages = objective.advantages(np.random.default_rng(0).normal(size=(4, 3)))
    totals = []
    for ranks in (1, 2):
        total = torch.zeros(())
        for rank in range(ranks):
            for n in range(4)[share(groups, rank, ranks)]:  # type: ignore[arg-type]
                loss, _ = objective.loss(policy, stepper, groups[n], advantages[n], [1], GUIDANCE)
                total = total + gradient(policy, loss / len(groups))
        totals.append(total)
    assert difference(totals[0], totals[1]) <= 1e-5


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


@torch.no_grad()
def means(policy: DiffusionPolicy, stepper: Stepper, t: Trajectory, position: int) -> list[torch.Tensor]:
    """[mean of the policy, mean of the reference]."""
    mean = GRPO(GRPOConfig())._score(policy, stepper, t, position, GUIDANCE)[1]
    with policy.adapter_disabled():
        return [mean, GRPO(GRPOConfig())._score(policy, stepper, t, position, GUIDANCE)[1]]


def test_kl_from_the_means_is_minus_the_expected_log_ratio(fresh: Fresh) -> None:
    """Monte Carlo over the noise; a missing half, a sum for a mean or a wrong sigma would be dozens of errors away."""
    policy, stepper, rollout = fresh
    t, position = rollout.trajectory, 6
    _, stats = GRPO(GRPOConfig(kl_coef=1.0)).loss(policy, stepper, t, np.zeros(6), [position], GUIDANCE)
    mean, reference = means(policy, stepper, t, position)
    sigma, repeats = float(stepper.sigmas[int(t.step_index[position])]), 2000
    noise = torch.randn((repeats, *mean.shape), generator=torch.Generator().manual_seed(0))
    x, many = (mean + sigma * noise).flatten(0, 1), (repeats, 1, 1, 1)
    log_ratio = gaussian_log_prob(x, reference.repeat(many), sigma) - gaussian_log_prob(x, mean.repeat(many), sigma)
    estimate, error = -log_ratio.mean().item(), log_ratio.std().item() / len(log_ratio) ** 0.5
    assert error < 0.02 * estimate
    assert abs(stats["kl_ref"] - estimate) < 3 * error


def test_kl_to_the_reference_is_zero_when_the_adapter_is_disabled(fresh: Fresh) -> None:
    policy, stepper, rollout = fresh
    objective = GRPO(GRPOConfig(kl_coef=1.0))
    with policy.adapter_disabled():
        _, stats = objective.loss(policy, stepper, rollout.trajectory, np.zeros(6), [0, 5], GUIDANCE)
    assert stats["kl_ref"] == 0.0
    _, stats = objective.loss(policy, stepper, rollout.trajectory, np.zeros(6), [0, 5], GUIDANCE)
    assert stats["kl_ref"] > 1e-3


def test_kl_to_the_reference_is_zero_with_zero_gradient_at_the_start() -> None:
    policy, stepper, rollout = make(scale=0.0)
    loss, stats = GRPO(GRPOConfig(kl_coef=1.0)).loss(policy, stepper, rollout.trajectory, np.zeros(6), [0, 5], GUIDANCE)
    assert loss.item() == stats["kl_ref"] == 0.0
    assert (gradient(policy, loss) == 0).all()


def test_kl_to_the_reference_is_that_of_two_gaussians_and_pulls_back(fresh: Fresh) -> None:
    policy, stepper, rollout = fresh
    objective, t = GRPO(GRPOConfig(kl_coef=1.0)), rollout.trajectory
    loss, stats = objective.loss(policy, stepper, t, np.zeros(6), [4], GUIDANCE)
    mean, reference = means(policy, stepper, t, 4)
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
    fresh: Fresh,
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


def test_misuse_is_a_bug_with_a_message(fresh: Fresh) -> None:
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
