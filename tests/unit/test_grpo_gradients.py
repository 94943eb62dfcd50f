"""GRPO on a real (tiny) diffusion model: ratio 1 on fresh data, and a first gradient that is the policy gradient."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion.policy import DiffusionPolicy
from diffusion.sampling import SamplingConfig, TrainedStepsConfig, array_to_tensor, sample_rollout
from learner.batches import share
from learner.grpo import GRPO, GRPOConfig
from learner.replay import replay
from tests.policies import GUIDANCE, Drawn, Exact, difference, drawn, exact, gradient, restored, score
from tests.tiny import tiny_pipeline

CFG = SamplingConfig(steps=10, group_size=6, guidance_scale=GUIDANCE, trained=TrainedStepsConfig(mode="all"))
ADVANTAGES = np.array([1.0, -1.0, 0.5, -0.5, 2.0, -2.0], np.float32)
POSITIONS = [2, 7]


@pytest.fixture
def fresh() -> Iterator[Drawn]:
    """A group just drawn, with an adapter that a test may move."""
    with restored(drawn(tiny_pipeline(), CFG)) as made:
        yield made


@pytest.fixture(scope="module")
def precise() -> Exact:
    """The same policy and group in float64."""
    return exact(tiny_pipeline(), CFG)


# ---- parity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_ratio_is_exactly_one_on_fresh_data_at_every_trained_step(dtype: str) -> None:
    policy, stepper, rollout = drawn(tiny_pipeline(), CFG, dtype)
    assert GRPO(GRPOConfig()).parity(policy, stepper, rollout.trajectory, GUIDANCE) == 0.0
    positions = range(rollout.trajectory.num_positions)
    _, stats = GRPO(GRPOConfig()).loss(policy, stepper, rollout.trajectory, ADVANTAGES, positions, GUIDANCE)
    assert stats["ratio_mean"] == 1.0  # with gradients on, too
    assert stats["ratio_max_dev"] == stats["clip_fraction"] == stats["approx_kl"] == 0.0


def test_a_policy_that_reloaded_the_adapter_replays_exactly(fresh: Drawn) -> None:
    sampler, stepper, rollout = fresh
    learner = DiffusionPolicy.load(sampler.config, adapter_seed=5)
    assert GRPO(GRPOConfig()).parity(learner, stepper, rollout.trajectory, GUIDANCE) > 1e-5
    learner.load_adapter(sampler.adapter_state())
    assert GRPO(GRPOConfig()).parity(learner, stepper, rollout.trajectory, GUIDANCE) == 0.0


def test_storing_other_latents_than_were_scored_breaks_parity(
    fresh: Drawn,
) -> None:
    """The must-fail twin: latents scored in float32 and then rounded to bfloat16, as the published code does."""
    policy, stepper, rollout = fresh
    t = rollout.trajectory
    rounded = array_to_tensor(t.x_prev, t.dtype).bfloat16().float().numpy()
    deviation = GRPO(GRPOConfig()).parity(policy, stepper, replace(t, x_prev=rounded), GUIDANCE)
    assert deviation > 0.1 * GRPOConfig().clip_range  # what the parity gate refuses
    _, stats = GRPO(GRPOConfig()).loss(policy, stepper, replace(t, x_prev=rounded), ADVANTAGES, [8], GUIDANCE)
    assert stats["clip_fraction"] > 0.5


def test_another_guidance_scale_breaks_parity(fresh: Drawn) -> None:
    policy, stepper, rollout = fresh
    assert GRPO(GRPOConfig()).parity(policy, stepper, rollout.trajectory, GUIDANCE + 0.5) > 1e-5


def test_training_the_conditional_half_only_keeps_parity_within_the_gate(
    fresh: Drawn,
) -> None:
    policy, stepper, rollout = fresh
    cfg = GRPOConfig(train_guidance="conditional")
    _, stats = GRPO(cfg).loss(policy, stepper, rollout.trajectory, ADVANTAGES, range(9), GUIDANCE)
    assert stats["ratio_max_dev"] < 0.1 * cfg.clip_range


# ---- gradients ---------------------------------------------------------------------------------------------


def test_the_first_gradient_is_the_policy_gradient(fresh: Drawn) -> None:
    policy, stepper, rollout = fresh
    objective, t = GRPO(GRPOConfig()), rollout.trajectory
    loss, _ = objective.loss(policy, stepper, t, ADVANTAGES, [2, 5], GUIDANCE)
    log_prob = torch.stack([replay(policy, stepper, t, k, GUIDANCE)[0] for k in (2, 5)])
    reinforce = -(torch.from_numpy(ADVANTAGES) * log_prob).mean()
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, reinforce), rtol=1e-4, atol=1e-8)


@pytest.fixture(scope="module")
def finite_differences(precise: Exact) -> dict[int, float]:
    """Central differences of -mean(A log_prob), the policy gradient that knows neither ratio nor clipping, by entry of
    the flattened adapter: five random parameters.
    """
    policy, stepper, t = precise
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
    precise: Exact, finite_differences: dict[int, float]
) -> None:
    policy, stepper, t = precise
    loss, stats = GRPO(GRPOConfig()).loss(policy, stepper, t, ADVANTAGES, POSITIONS, GUIDANCE)
    assert loss.dtype == torch.float64
    assert stats["ratio_max_dev"] == 0.0
    assert largest_error(gradient(policy, loss), finite_differences) < 1e-6


def test_finite_differences_catch_a_wrong_sign_and_a_stale_old_log_prob(
    precise: Exact, finite_differences: dict[int, float]
) -> None:
    """The must-fail twins of the test above, against the 1e-4 that it promises."""
    policy, stepper, t = precise
    objective = GRPO(GRPOConfig())
    wrong_sign, _ = objective.loss(policy, stepper, t, -ADVANTAGES, POSITIONS, GUIDANCE)
    assert largest_error(gradient(policy, wrong_sign), finite_differences) > 1.0
    with policy.adapter_disabled():
        stale = score(policy, stepper, t, range(t.num_positions)).numpy().T
    for clip_range in (1e-4, 0.9):  # some images clipped; none clipped, but weighed by a ratio that is not 1
        objective = GRPO(GRPOConfig(clip_range=clip_range))
        loss, _ = objective.loss(policy, stepper, replace(t, log_prob=stale), ADVANTAGES, POSITIONS, GUIDANCE)
        assert largest_error(gradient(policy, loss), finite_differences) > 1e-3


def test_a_step_down_the_loss_makes_good_images_likelier_and_bad_ones_less(fresh: Drawn) -> None:
    policy, stepper, rollout = fresh
    objective, t = GRPO(GRPOConfig()), rollout.trajectory
    loss, _ = objective.loss(policy, stepper, t, ADVANTAGES, range(9), GUIDANCE)
    grad = gradient(policy, loss)
    start = torch.cat([p.data.flatten() for p in policy.trainable_parameters()])
    torch.nn.utils.vector_to_parameters(start - 0.02 * grad / grad.norm(), policy.trainable_parameters())
    new = score(policy, stepper, t, range(9))
    change = (new - torch.from_numpy(t.log_prob.T)).mean(0).numpy()
    assert (change * ADVANTAGES).mean() > 0


def test_equal_rewards_give_exactly_no_gradient(fresh: Drawn) -> None:
    policy, stepper, rollout = fresh
    objective = GRPO(GRPOConfig())
    advantages = objective.advantages(np.full((1, 6), 0.3))[0]
    loss, _ = objective.loss(policy, stepper, rollout.trajectory, advantages, [3], GUIDANCE)
    assert (gradient(policy, loss) == 0).all()


def test_steps_one_by_one_add_up_to_all_at_once(fresh: Drawn) -> None:
    policy, stepper, rollout = fresh
    objective, t = GRPO(GRPOConfig(kl_coef=0.1)), rollout.trajectory
    whole, stats = objective.loss(policy, stepper, t, ADVANTAGES, [0, 4, 8], GUIDANCE)
    parts = [objective.loss(policy, stepper, t, ADVANTAGES, [k], GUIDANCE) for k in (0, 4, 8)]
    assert whole.item() == pytest.approx(np.mean([loss.item() for loss, _ in parts]), abs=1e-7)
    assert stats["kl_ref"] == pytest.approx(np.mean([s["kl_ref"] for _, s in parts]), rel=1e-6)
    summed = sum(gradient(policy, loss / 3) for loss, _ in parts)
    assert isinstance(summed, torch.Tensor)
    torch.testing.assert_close(summed, gradient(policy, whole), rtol=1e-4, atol=1e-8)


def test_the_order_of_images_in_a_group_does_not_matter(fresh: Drawn) -> None:
    policy, stepper, rollout = fresh
    order, t = np.random.default_rng(0).permutation(6), rollout.trajectory
    shuffled = replace(t, x_t=t.x_t[order], x_prev=t.x_prev[order], log_prob=t.log_prob[order])
    objective = GRPO(GRPOConfig())
    a, _ = objective.loss(policy, stepper, t, ADVANTAGES, [1, 6], GUIDANCE)
    b, _ = objective.loss(policy, stepper, shuffled, ADVANTAGES[order], [1, 6], GUIDANCE)
    assert a.item() == pytest.approx(b.item(), abs=1e-6)
    assert difference(gradient(policy, a), gradient(policy, b)) <= 1e-5


def test_splitting_a_group_into_micro_batches_changes_neither_loss_nor_gradient(fresh: Drawn) -> None:
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


def test_the_number_of_ranks_does_not_change_the_gradient(fresh: Drawn) -> None:
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


# ---- what saves memory changes nothing -----------------------------------------------------------------------


def test_gradient_checkpointing_computes_blocks_twice_and_gives_the_same_gradient(fresh: Drawn) -> None:
    policy, stepper, rollout = fresh
    saving = DiffusionPolicy.load(policy.config.model_copy(update={"gradient_checkpointing": True}))
    saving.load_adapter(policy.adapter_state())
    objective = GRPO(GRPOConfig(kl_coef=0.1))  # the pass with the adapter off must not be what is computed again
    found = []
    for who in (policy, saving):
        forwards: list[int] = []
        block = who.denoiser.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0")
        handle = block.register_forward_pre_hook(lambda *_, seen=forwards: seen.append(1))
        loss, _ = objective.loss(who, stepper, rollout.trajectory, ADVANTAGES, [4], GUIDANCE)
        before = len(forwards)
        found.append((loss.item(), gradient(who, loss), before, len(forwards) - before))
        handle.remove()
    (plain, grad, _, again), (loss_value, saved, passes, recomputed) = found
    assert (again, passes, recomputed) == (0, 2, 1), "a policy and a reference pass; only the first is done again"
    assert loss_value == plain
    assert grad.norm() > 0
    assert difference(grad, saved) <= 1e-6


def test_half_precision_weights_leave_adapter_gradient_and_log_probs_in_float32() -> None:
    policy, stepper, rollout = drawn(tiny_pipeline(), CFG, "bfloat16")
    trainable = {id(parameter) for parameter in policy.trainable_parameters()}
    assert {p.dtype for p in policy.denoiser.parameters() if id(p) not in trainable} == {torch.bfloat16}
    log_prob, mean = replay(policy, stepper, rollout.trajectory, 3, GUIDANCE)
    assert log_prob.dtype == mean.dtype == torch.float32
    grads = torch.autograd.grad(log_prob.sum(), policy.trainable_parameters())
    assert {p.dtype for p in policy.trainable_parameters()} | {g.dtype for g in grads} == {torch.float32}
    assert all(g.isfinite().all() for g in grads)
