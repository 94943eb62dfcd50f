"""Advantages: relative to the group, indifferent to the reward's scale, silent when there is nothing to learn."""

import numpy as np
import pytest

from learner.advantages import StdMode, group_advantages, mixed_rewards
from learner.batches import Group, batch_rewards

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


# ---- several rewards -----------------------------------------------------------------------------------------

PARTS = {"steering": REWARDS, "jpeg": 300.0 * np.random.default_rng(1).normal(size=(6, 8))}
EVEN = {"steering": 1.0, "jpeg": 1.0}


def test_the_scales_of_mixed_components_do_not_matter_but_those_of_a_plain_sum_do() -> None:
    rescaled = {"steering": PARTS["steering"] * 20 - 3, "jpeg": PARTS["jpeg"] / 50}
    np.testing.assert_allclose(mixed_rewards(PARTS, EVEN), mixed_rewards(rescaled, EVEN), atol=1e-9)
    plain, other = (group_advantages(parts["steering"] + parts["jpeg"]) for parts in (PARTS, rescaled))
    assert np.abs(plain - other).max() > 0.5


def test_a_mixture_is_the_weighted_sum_of_what_each_reward_alone_would_advise() -> None:
    weights = {"steering": 2.0, "jpeg": -0.5}  # a cost has a negative weight
    wanted = group_advantages(PARTS["steering"]) - 0.25 * group_advantages(PARTS["jpeg"])
    shrunk = wanted / np.maximum(wanted.std(1, keepdims=True), 1.0)  # where they agree; a dispute is not blown up
    assert 0 < (wanted.std(1) > 1.0).sum() < 6
    np.testing.assert_allclose(group_advantages(mixed_rewards(PARTS, weights)), shrunk, atol=1e-5)
    doubled = {name: 2 * weight for name, weight in weights.items()}
    np.testing.assert_allclose(mixed_rewards(PARTS, doubled), mixed_rewards(PARTS, weights), rtol=1e-6)


def test_a_mixture_of_one_is_that_reward() -> None:
    mixed = mixed_rewards(PARTS, {"jpeg": 3.0})
    np.testing.assert_allclose(group_advantages(mixed), group_advantages(PARTS["jpeg"]), atol=1e-5)


@pytest.mark.parametrize("std", MODES)
def test_a_component_that_is_equal_in_a_group_adds_exactly_nothing_there(std: StdMode) -> None:
    parts = {**PARTS, "jpeg": PARTS["jpeg"].copy()}
    parts["jpeg"][2] = 0.1 + 0.2
    mixed = mixed_rewards(parts, EVEN, std)
    assert np.array_equal(mixed[2], mixed_rewards({"steering": REWARDS}, {"steering": 1.0}, std)[2])
    assert not np.array_equal(mixed[1], mixed_rewards({"steering": REWARDS}, {"steering": 1.0}, std)[1])
    parts["steering"] = np.full_like(REWARDS, 0.7)
    assert (group_advantages(mixed_rewards(parts, EVEN, std), std)[2] == 0.0).all()


def test_noise_below_the_floor_stays_small_through_both_normalisations() -> None:
    noise = {name: 0.3 + 1e-7 * np.random.default_rng(n).normal(size=(6, 8)) for n, name in enumerate(PARTS)}
    assert np.abs(group_advantages(mixed_rewards(noise, EVEN, floor=1e-4), floor=1e-4)).max() < 0.01
    naive = np.sum([group_advantages(part, floor=1e-4) for part in noise.values()], axis=0)
    assert np.abs(group_advantages(naive, floor=1e-4)).max() > 1.0  # the must-fail twin


def test_a_mixture_that_says_nothing_or_names_nothing_is_refused() -> None:
    for weights in ({}, {"steering": 0.0}, {"steering": np.nan}):
        with pytest.raises(ValueError, match="weights must be finite"):
            mixed_rewards(PARTS, weights)
    with pytest.raises(KeyError, match="pickscore"):
        mixed_rewards(PARTS, {"pickscore": 1.0})
    with pytest.raises(ValueError, match="must be finite"):
        mixed_rewards({"steering": np.full((1, 2), np.nan)}, {"steering": 1.0})


def test_a_batch_gives_its_totals_or_with_a_mixture_its_normalised_parts() -> None:
    groups = [
        Group(n, "p", "safe", 0, "c", "s", REWARDS[n].astype(np.float32), parts, [], {})
        for n in range(6)
        for parts in [{name: values[n].astype(np.float32) for name, values in PARTS.items()} | {"watched": np.zeros(8)}]
    ]
    np.testing.assert_array_equal(batch_rewards(groups, None, "group", 1e-4), REWARDS.astype(np.float32))
    mixed = batch_rewards(groups, EVEN, "batch", 1e-3)
    np.testing.assert_allclose(mixed, mixed_rewards(PARTS, EVEN, "batch", 1e-3), rtol=1e-4, atol=1e-8)
