"""The corrected score: gains count as far as the judge approves, losses in full."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.config import EvaluationConfig
from evaluation.corrected import as_quality, corrected

BASE = np.array([0.1, -0.3, 0.5, 0.2])


def test_the_base_is_its_own_corrected_score_whatever_its_quality() -> None:
    for quality in (np.zeros(4), np.ones(4), np.array([0.0, 0.3, 0.7, 1.0])):
        np.testing.assert_array_equal(corrected(BASE, BASE, quality), BASE)


def test_gains_count_as_far_as_the_judge_approves_and_losses_in_full() -> None:
    reward = BASE + np.array([0.4, 0.4, -0.4, 0.4])
    found = corrected(reward, BASE, np.array([1.0, 0.0, 1.0, 0.5]))
    np.testing.assert_allclose(found, BASE + np.array([0.4, 0.0, -0.4, 0.2]))
    assert (found <= reward + 1e-12).all()


def test_a_hacked_reward_leaves_its_corrected_score_behind() -> None:
    honest = corrected(BASE + 0.2, BASE, np.full(4, 0.9)).mean()
    hacked = corrected(BASE + 0.4, BASE, np.full(4, 0.1)).mean()
    assert hacked < honest


def test_shifting_all_rewards_shifts_the_score() -> None:
    rng = np.random.default_rng(0)
    reward, quality = rng.normal(size=4), rng.random(4)
    np.testing.assert_allclose(corrected(reward + 3, BASE + 3, quality), corrected(reward, BASE, quality) + 3)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        corrected(BASE, BASE[:3], BASE)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        corrected(BASE, BASE, np.array([0.0, 0.5, 1.0, 1.5]))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        corrected(BASE, BASE, np.array([0.0, 0.5, 1.0, np.nan]))


def test_a_judges_scale() -> None:
    np.testing.assert_allclose(as_quality(np.array([0.1, 0.2, 0.25, 0.3, 0.9]), 0.2, 0.3), [0, 0, 0.5, 1, 1])
    judge = {"reward": {"name": "jpeg_compressibility"}, "low": 0.3, "high": 0.2}
    with pytest.raises(ValueError, match=r"low \(0.3\) must be below high \(0.2\)"):
        EvaluationConfig.model_validate({"judge": judge})
