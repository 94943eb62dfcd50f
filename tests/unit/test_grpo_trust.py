"""Trust regions around the policy at the start of a batch: decoupled PPO, Flow-DPPO's mask, GRPO-Guard."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from diffusion.flow_steps import FlowNoiseConfig
from diffusion.sampling import SamplingConfig, TrainedStepsConfig
from learner.grpo import GRPO, GRPOConfig, Proximal
from learner.replay import replay
from learner.surrogates import output_gain, step_kl
from tests.policies import GUIDANCE, Drawn, drawn, gradient, means, moved, restored, score
from tests.tiny import tiny_pipeline
from tests.tiny_flow import tiny_sd3

CFG = SamplingConfig(steps=10, group_size=6, guidance_scale=GUIDANCE, trained=TrainedStepsConfig(count=3, last=8))
ADVANTAGES = np.array([1.0, -1.0, 0.5, -0.5, 2.0, -2.0], np.float32)

PLAIN = GRPOConfig(updates_per_batch=3)
DECOUPLED = GRPOConfig(updates_per_batch=3, anchor="proximal")
MASKED = GRPOConfig(updates_per_batch=3, anchor="proximal", trust="kl_mask")
INTERPOLATED = GRPOConfig(updates_per_batch=3, anchor="interpolated")
GUARDED = GRPOConfig(updates_per_batch=3, anchor="proximal", ratio="guarded")


@pytest.fixture
def fresh() -> Iterator[Drawn]:
    """A group just drawn, with an adapter that a test may move."""
    with restored(drawn(tiny_pipeline(), CFG)) as made:
        yield made


def prepared(cfg: GRPOConfig, made: Drawn) -> Proximal:
    found = GRPO(cfg).prepare(made.policy, made.stepper, made.rollout.trajectory, GUIDANCE, seed=0)
    assert found is not None
    return found


# ---- decoupled PPO -------------------------------------------------------------------------------------------


def test_an_anchor_that_is_the_behaviour_policy_gives_plain_ppo_and_another_does_not(fresh: Drawn) -> None:
    policy, stepper, rollout = fresh
    t, state = rollout.trajectory, policy.adapter_state()
    moved(policy, 0.01, seed=1)
    other = prepared(DECOUPLED, fresh)
    policy.load_adapter(state)
    behaviour = prepared(DECOUPLED, fresh)
    moved(policy, 0.0003, seed=2)
    plain, figures = GRPO(PLAIN).loss(policy, stepper, t, ADVANTAGES, [0, 2], GUIDANCE)
    same, with_weight = GRPO(DECOUPLED).loss(policy, stepper, t, ADVANTAGES, [0, 2], GUIDANCE, behaviour)
    assert 0.0 < figures["clip_fraction"] < 1.0, "the case has clipped images and others"
    assert same == plain
    assert with_weight == figures | {"weight_mean": 1.0, "weight_capped": 0.0}
    assert torch.equal(gradient(policy, same), gradient(policy, plain))
    twin, figures = GRPO(DECOUPLED).loss(policy, stepper, t, ADVANTAGES, [0, 2], GUIDANCE, other)
    assert twin != plain and figures["weight_mean"] != 1.0


def test_stale_groups_begin_inside_the_trust_region_of_the_proximal_policy_only(fresh: Drawn) -> None:
    policy, stepper, rollout = fresh
    t = rollout.trajectory
    moved(policy, 0.02, seed=1)  # what the learner has done since the group was drawn
    loss, figures = GRPO(PLAIN).loss(policy, stepper, t, ADVANTAGES, [1], GUIDANCE)
    assert figures["clip_fraction"] > 0.5
    clipped = gradient(policy, loss)
    loss, figures = GRPO(DECOUPLED).loss(policy, stepper, t, ADVANTAGES, [1], GUIDANCE, prepared(DECOUPLED, fresh))
    assert figures["ratio_max_dev"] == figures["clip_fraction"] == 0.0
    log_prob, _ = replay(policy, stepper, t, 1, GUIDANCE)
    weight = torch.exp(log_prob.detach() - t.old_log_prob(1))
    assert figures["weight_mean"] == pytest.approx(weight.mean().item())
    whole = gradient(policy, -(weight * torch.from_numpy(ADVANTAGES) * log_prob).mean())
    torch.testing.assert_close(gradient(policy, loss), whole, rtol=1e-4, atol=1e-8)
    assert (clipped - whole).norm() > 0.1 * whole.norm(), "around the behaviour policy some images have no gradient"


@pytest.mark.parametrize("cfg", [DECOUPLED, GUARDED])
def test_a_single_update_needs_no_pass_of_its_own(fresh: Drawn, cfg: GRPOConfig) -> None:
    """At the only update of a batch the policy still is the one at its start."""
    policy, stepper, rollout = fresh
    moved(policy, 0.01, seed=1)
    single = GRPO(cfg.model_copy(update={"updates_per_batch": 1}))
    assert single.prepare(policy, stepper, rollout.trajectory, GUIDANCE, seed=0) is None
    given = GRPO(cfg).loss(policy, stepper, rollout.trajectory, ADVANTAGES, [1], GUIDANCE, prepared(cfg, fresh))
    derived = single.loss(policy, stepper, rollout.trajectory, ADVANTAGES, [1], GUIDANCE)
    assert given[0] == derived[0] and given[1] == derived[1]
    assert torch.equal(gradient(policy, given[0]), gradient(policy, derived[0]))
    assert GRPO(PLAIN).prepare(policy, stepper, rollout.trajectory, GUIDANCE, seed=0) is None


def test_what_is_prepared_is_the_policy_of_that_moment(fresh: Drawn) -> None:
    policy, stepper, rollout = fresh
    t = rollout.trajectory
    before = score(policy, stepper, t, range(3)), means(policy, stepper, t, range(3))
    found = prepared(MASKED, fresh)
    moved(policy, 0.01, seed=1)
    assert found.mean is not None and not found.log_prob.requires_grad
    assert torch.equal(found.log_prob.T, before[0])
    assert torch.equal(found.mean.transpose(0, 1), before[1])
    assert prepared(DECOUPLED, fresh).mean is None, "means are kept only for what reads them"


@pytest.mark.parametrize(("at", "weighted_by"), [(0.0, "behaviour"), (1.0, "present")])
def test_the_interpolated_anchor_is_the_behaviour_policy_at_0_and_the_present_one_at_1(
    fresh: Drawn, at: float, weighted_by: str
) -> None:
    policy, stepper, rollout = fresh
    t = rollout.trajectory
    behaviour = prepared(DECOUPLED, fresh)
    moved(policy, 0.0003, seed=1)
    anchor = behaviour if weighted_by == "behaviour" else prepared(DECOUPLED, fresh)
    loss, figures = GRPO(INTERPOLATED).loss(policy, stepper, t, ADVANTAGES, [0, 2], GUIDANCE, proximal_at=at)
    same, with_anchor = GRPO(DECOUPLED).loss(policy, stepper, t, ADVANTAGES, [0, 2], GUIDANCE, anchor)
    assert loss == same and figures == with_anchor
    assert torch.equal(gradient(policy, loss), gradient(policy, same))
    halfway, between = GRPO(INTERPOLATED).loss(policy, stepper, t, ADVANTAGES, [0, 2], GUIDANCE, proximal_at=0.5)
    assert halfway != loss and 0.0 < between["ratio_max_dev"] != figures["ratio_max_dev"]
    assert GRPO(INTERPOLATED).prepare(policy, stepper, t, GUIDANCE, seed=0) is None, "it needs no forward of its own"


# ---- Flow-DPPO's mask ----------------------------------------------------------------------------------------


def test_a_threshold_out_of_reach_is_the_unclipped_loss(fresh: Drawn) -> None:
    policy, stepper, rollout = fresh
    t, anchor = rollout.trajectory, prepared(MASKED, fresh)
    moved(policy, 0.01, seed=1)
    out_of_reach = GRPO(MASKED.model_copy(update={"kl_threshold": 1e9}))
    loss, figures = out_of_reach.loss(policy, stepper, t, ADVANTAGES, [1], GUIDANCE, anchor)
    log_prob, _ = replay(policy, stepper, t, 1, GUIDANCE)
    unclipped = -(torch.from_numpy(ADVANTAGES) * torch.exp(log_prob - t.old_log_prob(1))).mean()
    torch.testing.assert_close(loss, unclipped)
    torch.testing.assert_close(gradient(policy, loss), gradient(policy, unclipped), rtol=1e-4, atol=1e-8)
    assert figures["mask_fraction"] == 0.0 < figures["kl_anchor"]
    assert "clip_fraction" not in figures


def test_nothing_is_masked_before_the_policy_moves_and_then_what_is_far_and_goes_on(fresh: Drawn) -> None:
    policy, stepper, rollout = fresh
    t, anchor = rollout.trajectory, prepared(MASKED, fresh)
    tiny = GRPO(MASKED.model_copy(update={"kl_threshold": 1e-30}))
    _, figures = tiny.loss(policy, stepper, t, ADVANTAGES, [0, 1, 2], GUIDANCE, anchor)
    assert figures["kl_anchor"] == figures["mask_fraction"] == 0.0
    moved(policy, 0.01, seed=1)
    assert anchor.mean is not None
    kl = step_kl(means(policy, stepper, t, [1])[0], anchor.mean[:, 1], float(stepper.sigmas[int(t.step_index[1])]))
    threshold = float(kl.sort().values[2:4].mean())  # three images are beyond it
    ratio = torch.exp(score(policy, stepper, t, [1])[0] - anchor.log_prob[:, 1])
    far = kl >= threshold
    objective = GRPO(MASKED.model_copy(update={"kl_threshold": threshold}))
    for outward in (True, False):
        advantages = torch.where((ratio > 1) == outward, 1.0, -1.0)
        loss, figures = objective.loss(policy, stepper, t, advantages, [1], GUIDANCE, anchor)
        assert figures["mask_fraction"] == (0.5 if outward else 0.0)
        assert figures["kl_anchor"] == pytest.approx(kl.mean().item(), rel=1e-5)
        if outward:  # those that are masked pull no more
            alone, _ = objective.loss(policy, stepper, t, advantages * far, [1], GUIDANCE, anchor)
            assert (gradient(policy, alone) == 0).all()
            assert gradient(policy, loss).norm() > 0


# ---- GRPO-Guard ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ddim", "sde", "cps"])
def test_a_guarded_ratio_begins_at_one_with_the_policy_gradient_of_each_step_rescaled(kind: str) -> None:
    flow = kind != "ddim"
    cfg = CFG.model_copy(update={"flow": FlowNoiseConfig.model_validate({"kind": kind})}) if flow else CFG
    policy, stepper, rollout = made = drawn(tiny_sd3() if flow else tiny_pipeline(), cfg)
    t, anchor = rollout.trajectory, prepared(GUARDED, made)
    for position in (0, 2):
        i = int(t.step_index[position])
        sigma = float(stepper.sigmas[i])
        loss, figures = GRPO(GUARDED).loss(policy, stepper, t, ADVANTAGES, [position], GUIDANCE, anchor)
        assert figures["ratio_max_dev"] == 0.0 and figures["ratio_mean"] == 1.0
        log_prob, _ = replay(policy, stepper, t, position, GUIDANCE)
        tempering = 2 * sigma**2 if kind == "cps" else 1.0  # only its log-prob leaves 1 / (2 sigma^2) out
        scale = sigma / tempering / output_gain(stepper, i)
        expected = gradient(policy, -scale * (torch.from_numpy(ADVANTAGES) * log_prob).mean())
        torch.testing.assert_close(gradient(policy, loss), expected, rtol=1e-3, atol=1e-7)


def test_guarding_keeps_ratios_centred_where_plain_ones_drift_left(fresh: Drawn) -> None:
    policy, stepper, rollout = fresh
    t, plain_anchor, anchor = rollout.trajectory, prepared(DECOUPLED, fresh), prepared(GUARDED, fresh)
    moved(policy, 0.05, seed=1)
    positions = range(3)
    _, plain = GRPO(DECOUPLED).loss(policy, stepper, t, ADVANTAGES, positions, GUIDANCE, plain_anchor)
    _, guarded = GRPO(GUARDED).loss(policy, stepper, t, ADVANTAGES, positions, GUIDANCE, anchor)
    drift = (1.0 - plain["ratio_mean"]) / plain["approx_kl"] ** 0.5  # in deviations of the log-ratio
    assert drift > 0.5
    assert abs(1.0 - guarded["ratio_mean"]) / guarded["approx_kl"] ** 0.5 < 0.5 * drift
