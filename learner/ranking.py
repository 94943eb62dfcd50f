"""Ranking losses of one group: pure functions of implicit rewards s [k] and rewards r [k].

An image's rank is chosen as Plackett and Luce have it: the best of all, then the best of the rest, and so on. With
r_1 >= ... >= r_k, p_i = softmax of s and q_i = softmax of r / tau over the images i .. k that are left:

L = sum_{i < k} [ log sum_{m >= i} exp(s_m) - sum_{j >= i} q_i(j) s_j ]        (GDRO, arXiv 2601.02036)

``tau`` = 0 is the limit: the best of those left is chosen for certain, the Plackett-Luce likelihood, and of two images
DPO's softplus(-(s_w - s_l)). ``top1`` keeps the first choice only, softmax cross-entropy.

Images with equal rewards have no order, and which of them is "left" would depend on how they were numbered. So after l
of d equal images have been chosen, each of the d is left with weight 1 - l / d (Efron's rule for ties in Cox's
regression, 1977): without ties nothing changes, and no numbering enters. At tau = 0 the d share q_i equally.
"""

from __future__ import annotations

from typing import Literal

import torch

Ranking = Literal["full", "top1"]


def ranking_loss(scores: torch.Tensor, rewards: torch.Tensor, tau: float, ranking: Ranking = "full") -> torch.Tensor:
    """L, a scalar in the dtype of ``scores``; not divided by the number of choices.

    Invariant to s + const and to the order of images; at s = 0 it is sum_i log(k - i + 1). Its gradient with respect
    to s is the sum of p_i - q_i: bounded, whatever the scale of s and r.

    Args:
        scores: s [k]; the gradient's way.
        rewards: r [k], in units of which ``tau`` is.
        tau: temperature, 0 for a hard ranking.
    """
    left, q = choices(rewards, tau, ranking)
    return (_log_total(scores, left) - (q.to(scores) * scores).sum(1)).sum()


@torch.no_grad()
def target_kl(scores: torch.Tensor, rewards: torch.Tensor, tau: float, ranking: Ranking = "full") -> torch.Tensor:
    """sum_i KL(q_i || p_i), a scalar: what is left to gain, 0 where s_i - s_j = (r_i - r_j) / tau.

    Without ties L minus the entropies of q; at tau = 0 then L itself.
    """
    left, q = choices(rewards, tau, ranking)
    left, q = left.to(scores), q.to(scores)
    log_p = scores + left.log() - _log_total(scores, left)[:, None]
    return torch.where(q > 0, q * (q.clamp_min(torch.finfo(q.dtype).tiny).log() - log_p), 0.0).sum()


def choices(rewards: torch.Tensor, tau: float, ranking: Ranking = "full") -> tuple[torch.Tensor, torch.Tensor]:
    """The choices a ranking consists of: (left [c, k], q [c, k]), columns in the order of ``rewards``.

    ``left`` is 1 for images still to be chosen from, 0 for those chosen, between for ties; q the distribution to
    choose by. c = k - 1 choices of a full ranking, 1 of ``top1``.
    """
    chosen = rewards.sort(descending=True).values[: -1 if ranking == "full" else 1, None]
    better, equal = rewards > chosen, rewards == chosen
    rank = torch.arange(len(chosen), device=rewards.device)
    begun = (rank - better.sum(1)).to(rewards.dtype) / equal.sum(1)  # share of the equal ones chosen before
    left = torch.where(equal, (1.0 - begun)[:, None], (~better).to(rewards.dtype))
    if tau == 0.0:
        return left, equal.to(rewards.dtype) / equal.sum(1, keepdim=True)
    logits = ((rewards - chosen) / tau).masked_fill(better, -torch.inf) + left.log()
    return left, logits.softmax(1)


def best_share(rewards: torch.Tensor) -> torch.Tensor:
    """One-hot [k] on the best image; the best share it when they are several."""
    best = rewards == rewards.max()
    return best.to(rewards.dtype) / best.sum()


@torch.no_grad()
def ordered_share(scores: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """Of the pairs with different rewards, the share that s orders as r does; equal scores count as half."""
    above = rewards[:, None] > rewards
    gap = torch.sign(scores[:, None] - scores)
    return (0.5 + 0.5 * gap)[above].mean()


def _log_total(scores: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """log sum_m left_m exp(s_m), [c]."""
    return torch.logsumexp(scores + left.to(scores).log(), 1)
