"""Advantages: relative to the group, indifferent to the reward's scale, silent when there is nothing to learn."""

import numpy as np
import pytest

from learner.advantages import StdMode, group_advantages

REWARDS = np.random.default_rng(0).normal(0.3, 0.1, (6, 8))
MODES: tuple[StdMode, ...] = ("group", "batch", "mixed")


@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_group_has_mean_zero_and_deviation_one(size: int) -> None:
    a = group_advantages(REWARDS[:, :size])
    assert a.dtype == np.float32
    np.testing.assert_allclose(a.mean(1), 0.0, atol=1e-6)
    np.testing.assert_allclose(a.std(1), 1.0, atol=1e-6)


@pytest.mark.parametrize("std", MODES)
@pytest.mark.parametrize(("scale", "shift"), [(3.0, 0.0), (0.5, 7.0), (100.0, -2.0)])
def test_advantages_ignore_a_positive_affine_change_of_the_reward(std: StdMode, scale: float, shift: float) -> None:
    np.testing.assert_allclose(
        group_advantages(scale * REWARDS + shift, std), group_advantages(REWARDS, std), atol=1e-4
    )


@pytest.mark.parametrize("std", MODES)
def test_negating_the_reward_negates_the_advantage(std: StdMode) -> None:
    np.testing.assert_allclose(group_advantages(-REWARDS, std), -group_advantages(REWARDS, std), atol=1e-6)


@pytest.mark.parametrize("std", MODES)
def test_a_group_of_equal_rewards_gets_exactly_zero(std: StdMode) -> None:
    rewards = REWARDS.copy()
    rewards[2] = 0.1 + 0.2  # a float whose mean over 8 need not be itself
    a = group_advantages(rewards, std)
    assert (a[2] == 0.0).all()
    assert (a[[0, 1, 3, 4, 5]] != 0.0).all()
    assert (group_advantages(np.full((1, 7), 0.1), std, floor=1e-30) == 0.0).all()


def test_a_group_of_one_gets_exactly_zero() -> None:
    assert (group_advantages(np.array([[0.7], [0.1]])) == 0.0).all()


def test_a_group_normalised_by_itself_does_not_see_the_other_groups() -> None:
    changed = REWARDS.copy()
    changed[1:] *= 50
    assert np.array_equal(group_advantages(changed)[0], group_advantages(REWARDS)[0])
    assert not np.array_equal(group_advantages(changed, "batch")[0], group_advantages(REWARDS, "batch")[0])


def test_batch_std_is_pooled_within_groups_so_easy_prompts_do_not_dilute_it() -> None:
    shifted = REWARDS + np.arange(6)[:, None] * 100
    np.testing.assert_allclose(group_advantages(shifted, "batch"), group_advantages(REWARDS, "batch"), atol=1e-4)
    pooled = np.sqrt(REWARDS.var(1).mean())
    expected = (REWARDS - REWARDS.mean(1, keepdims=True)) / pooled
    np.testing.assert_allclose(group_advantages(REWARDS, "batch"), expected, atol=1e-6)


def test_mixed_lies_between_group_and_batch() -> None:
    g, b, m = (np.abs(group_advantages(REWARDS, std)) for std in MODES)
    assert (m >= np.minimum(g, b) - 1e-6).all()
    assert (m <= np.maximum(g, b) + 1e-6).all()
    within = REWARDS.var(1, keepdims=True)
    expected = (REWARDS - REWARDS.mean(1, keepdims=True)) / np.sqrt((within + within.mean()) / 2)
    np.testing.assert_allclose(group_advantages(REWARDS, "mixed"), expected, atol=1e-6)


def test_a_nearly_constant_group_is_not_amplified_beyond_the_floor() -> None:
    noise = 0.3 + 1e-7 * np.arange(8)[None]
    assert np.abs(group_advantages(noise, floor=1e-4)).max() < 0.01
    assert np.abs(group_advantages(noise, floor=1e-12)).max() > 1.0  # the must-fail twin


def test_clipping_bounds_the_advantage() -> None:
    rewards = np.zeros((1, 64))
    rewards[0, 0] = 1.0
    assert group_advantages(rewards).max() > 7
    assert group_advantages(rewards, clip=2.5).max() == 2.5


def test_permuting_images_permutes_advantages() -> None:
    order = np.random.default_rng(1).permutation(8)
    np.testing.assert_allclose(group_advantages(REWARDS[:, order]), group_advantages(REWARDS)[:, order], atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_poisoned_reward_is_never_averaged(bad: float) -> None:
    rewards = REWARDS.copy()
    rewards[1, 3] = bad
    with pytest.raises(ValueError, match="must be finite"):
        group_advantages(rewards)


def test_anything_but_a_table_is_a_bug() -> None:
    with pytest.raises(ValueError, match="n_groups, group_size"):
        group_advantages(np.zeros(8))
    with pytest.raises(ValueError, match="n_groups, group_size"):
        group_advantages(np.zeros((0, 8)))
