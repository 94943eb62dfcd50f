"""The ranking losses of GDRO as mathematics: in float64, without a model."""

import math

import pytest
import torch
from torch.nn.functional import softplus

from learner.ranking import Ranking, best_share, ordered_share, ranking_loss, target_kl

REWARDS = torch.tensor([0.3, -1.0, 0.9, 0.1, 0.5], dtype=torch.float64)
TIED = torch.tensor([0.3, 0.9, 0.3, 0.9, 0.3, -1.0, -1.0], dtype=torch.float64)
RANKINGS: list[Ranking] = ["full", "top1"]
every_ranking = pytest.mark.parametrize("ranking", RANKINGS)
every_tau = pytest.mark.parametrize("tau", [0.0, 0.05, 0.7])


def scores(k: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plackett_luce(s: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Minus the log-likelihood of the ranking, written as the product it is."""
    ordered = s[r.argsort(descending=True)]
    return -sum((ordered[i].exp() / ordered[i:].exp().sum()).log() for i in range(len(s)))  # type: ignore[return-value]


def as_published(s: torch.Tensor, r: torch.Tensor, tau: float) -> torch.Tensor:
    """L_GDRO term by term."""
    order = r.argsort(descending=True)
    s, r = s[order], r[order]
    loss = torch.zeros((), dtype=s.dtype)
    for i in range(len(s) - 1):
        q = (r[i:] / tau).softmax(0)
        loss = loss + s[i:].exp().sum().log() - (q * s[i:]).sum()
    return loss


@pytest.mark.parametrize("tau", [0.3, 2.0])
def test_the_loss_is_the_published_sum(tau: float) -> None:
    s = scores(5)
    assert ranking_loss(s, REWARDS, tau).item() == pytest.approx(as_published(s, REWARDS, tau).item(), rel=1e-14)
    top1 = torch.logsumexp(s, 0) - ((REWARDS / tau).softmax(0) * s).sum()
    assert ranking_loss(s, REWARDS, tau, "top1").item() == pytest.approx(top1.item(), rel=1e-14)


@pytest.mark.parametrize("tau", [0.0, 1e-4, 1e-300])
def test_without_temperature_it_is_the_plackett_luce_likelihood(tau: float) -> None:
    s = scores(5)
    assert ranking_loss(s, REWARDS, tau).item() == pytest.approx(plackett_luce(s, REWARDS).item(), rel=1e-14)
    assert ranking_loss(s, REWARDS, tau, "top1").item() == pytest.approx(-s.log_softmax(0)[2].item(), rel=1e-14)


@every_ranking
@pytest.mark.parametrize("tau", [0.0, 1e-4])
def test_of_two_images_without_temperature_it_is_dpo(tau: float, ranking: Ranking) -> None:
    for seed in range(5):
        s = scores(2, seed, scale=20.0)
        dpo = softplus(-(s[1] - s[0]))
        assert ranking_loss(s, REWARDS[:2].flip(0), tau, ranking).item() == pytest.approx(dpo.item(), rel=1e-14)


@every_tau
@every_ranking
@pytest.mark.parametrize("rewards", [REWARDS, TIED])
def test_neither_a_constant_nor_the_order_of_images_matters(
    rewards: torch.Tensor, tau: float, ranking: Ranking
) -> None:
    s = scores(len(rewards)).requires_grad_()
    loss = ranking_loss(s, rewards, tau, ranking)
    (grad,) = torch.autograd.grad(loss, s)
    assert ranking_loss(s + 100.0, rewards + 100.0, tau, ranking).item() == pytest.approx(loss.item(), rel=1e-9)
    for seed in range(4):
        order = torch.randperm(len(s), generator=torch.Generator().manual_seed(seed))
        shuffled = s.detach()[order].requires_grad_()
        again = ranking_loss(shuffled, rewards[order], tau, ranking)
        assert again.item() == pytest.approx(loss.item(), rel=1e-13)
        torch.testing.assert_close(torch.autograd.grad(again, shuffled)[0], grad[order], rtol=1e-10, atol=1e-12)


@every_tau
@pytest.mark.parametrize("rewards", [REWARDS, TIED, torch.zeros(4, dtype=torch.float64)])
def test_where_all_scores_are_equal_the_loss_counts_the_images_left(rewards: torch.Tensor, tau: float) -> None:
    k = len(rewards)
    for level in (0.0, 3.0):
        s = torch.full((k,), level, dtype=torch.float64)
        expected = sum(math.log(k - i) for i in range(k - 1))
        assert ranking_loss(s, rewards, tau).item() == pytest.approx(expected, rel=1e-12)
        assert ranking_loss(s, rewards, tau, "top1").item() == pytest.approx(math.log(k), rel=1e-12)


@pytest.mark.parametrize("tau", [0.1, 0.7])
def test_the_first_choice_less_the_entropy_of_its_target_is_a_kl(tau: float) -> None:
    q = (REWARDS / tau).softmax(0)
    entropy = -(q * q.log()).sum()
    for seed in range(5):
        s = scores(5, seed)
        gap = ranking_loss(s, REWARDS, tau, "top1") - entropy
        assert gap.item() > 0.0
        assert gap.item() == pytest.approx((q * (q / s.softmax(0)).log()).sum().item(), rel=1e-10)
        assert target_kl(s, REWARDS, tau, "top1").item() == pytest.approx(gap.item(), rel=1e-10)


@every_ranking
@pytest.mark.parametrize("rewards", [REWARDS, TIED])
def test_nothing_is_left_to_gain_where_scores_are_the_rewards_over_tau(rewards: torch.Tensor, ranking: Ranking) -> None:
    s = (rewards / 0.3 + 5.0).requires_grad_()
    assert target_kl(s, rewards, 0.3, ranking).item() == pytest.approx(0.0, abs=1e-12)
    (grad,) = torch.autograd.grad(ranking_loss(s, rewards, 0.3, ranking), s)
    assert grad.abs().max().item() < 1e-12
    assert target_kl(-s, rewards, 0.3, ranking).item() > 1.0


@every_tau
@every_ranking
@pytest.mark.parametrize("rewards", [REWARDS, TIED])
def test_the_gradient_agrees_with_finite_differences_and_is_bounded(
    rewards: torch.Tensor, tau: float, ranking: Ranking
) -> None:
    s, h = scores(len(rewards)), 1e-6
    torch.autograd.gradcheck(lambda s: ranking_loss(s, rewards, tau, ranking), s.requires_grad_(), eps=h)
    wild = scores(len(rewards), scale=1e6).requires_grad_()
    (grad,) = torch.autograd.grad(ranking_loss(wild, rewards, tau, ranking), wild)
    assert grad.abs().max().item() <= len(rewards)
    assert grad.sum().item() == pytest.approx(0.0, abs=1e-9)


@every_tau
@every_ranking
def test_a_step_down_the_loss_lifts_the_best_image_and_lowers_the_worst(tau: float, ranking: Ranking) -> None:
    s = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(ranking_loss(s, REWARDS, tau, ranking), s)
    assert grad[2] < 0.0 < grad[1]
    assert grad[1] == grad.max()


def test_equal_images_are_ranked_as_the_mean_of_their_numberings_would_be_where_they_score_alike() -> None:
    """Efron's rule is exact for equal scores; in between it depends on no numbering, which plain sorting would."""
    s = torch.tensor([0.4, 0.4, -0.7], dtype=torch.float64)
    r = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    nudged = [plackett_luce(s, r + torch.tensor([d, -d, 0.0], dtype=torch.float64)) for d in (1e-3, -1e-3)]
    assert ranking_loss(s, r, 0.0).item() == pytest.approx(float(sum(nudged)) / 2, rel=1e-12)


def test_one_image_has_no_rank() -> None:
    s = scores(1).requires_grad_()
    for ranking in RANKINGS:
        loss = ranking_loss(s, REWARDS[:1], 0.1, ranking)
        assert loss.item() == pytest.approx(0.0, abs=1e-15)
        assert torch.autograd.grad(loss, s)[0].abs().item() < 1e-15


def test_float32_scores_stay_float32_and_finite_at_any_scale() -> None:
    for scale in (1e-30, 1.0, 1e6):
        s = scores(5, scale=scale).float().requires_grad_()
        for tau in (0.0, 1e-6, 0.05):
            loss = ranking_loss(s, REWARDS.float(), tau)
            assert loss.dtype == torch.float32 and loss.isfinite()
            assert torch.autograd.grad(loss, s)[0].isfinite().all()
            assert target_kl(s.detach(), REWARDS.float(), tau).isfinite()


def test_the_best_share_first_place_and_pairs_are_counted() -> None:
    assert best_share(REWARDS).tolist() == [0.0, 0.0, 1.0, 0.0, 0.0]
    assert best_share(TIED).tolist() == [0.0, 0.5, 0.0, 0.5, 0.0, 0.0, 0.0]
    assert ordered_share(REWARDS, REWARDS).item() == 1.0
    assert ordered_share(-REWARDS, REWARDS).item() == 0.0
    assert ordered_share(torch.zeros(5), REWARDS).item() == 0.5
    assert ordered_share(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0.0, 0.0, 1.0])).item() == 0.5
