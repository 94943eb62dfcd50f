"""The surrogate losses of one denoising step: pure functions of log-ratios, means, weights and advantages.

Notation: pi is the current policy, pi_old the *anchor* its moves are measured from, mu and mu_old their means, sigma
the deviation of the step's noise, d latent dimensions. Everything per image is [G]; losses are means over the group.
"""

from __future__ import annotations

import torch

from diffusion.steps import Stepper, at_least_float32
from raysteer.errors import ConfigError

Figures = dict[str, float]


def clipped_loss(
    log_ratio: torch.Tensor, advantages: torch.Tensor, clip_range: float, weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, Figures]:
    """PPO's clipped surrogate, max(-A rho, -A clip(rho, 1 - c, 1 + c)) (Schulman et al. 2017, eq. 7), and its figures.

    Args:
        log_ratio, advantages: float32 [G].
        clip_range: c.
        weight: factor [G] of each image's loss, or None.
    """
    ratio = torch.exp(log_ratio)
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    loss = _mean(torch.maximum(-advantages * ratio, -advantages * clipped), weight)
    with torch.no_grad():
        figures = _ratio_figures(log_ratio, ratio)
        figures["clip_fraction"] = ((ratio - 1.0).abs() > clip_range).float().mean().item()
    return loss, figures


def masked_loss(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    kl: torch.Tensor,
    threshold: float,
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Figures]:
    """Flow-DPPO's surrogate (arXiv 2606.11025): -A rho, without the images whose policy has moved too far and goes on.

    An image is left out, and counts as 0 in the mean, when its exact KL has reached the threshold and its ratio has
    moved the way its advantage pushes: (rho > 1 and A > 0) or (rho < 1 and A < 0).

    Args:
        log_ratio, advantages: float32 [G].
        kl: [G], from ``step_kl``; decides only, has no gradient.
        threshold: least KL that is masked, a mean over latent dimensions.
        weight: factor [G] of each image's loss, or None.
    """
    ratio = torch.exp(log_ratio)
    with torch.no_grad():
        outward = ((ratio > 1.0) & (advantages > 0.0)) | ((ratio < 1.0) & (advantages < 0.0))
        masked = (kl >= threshold) & outward
        figures = _ratio_figures(log_ratio, ratio)
        figures |= {"mask_fraction": masked.float().mean().item(), "kl_anchor": kl.mean().item()}
    terms = -advantages * ratio
    return _mean(torch.where(masked, torch.zeros_like(terms), terms), weight), figures


def behaviour_weight(anchor: torch.Tensor, behaviour: torch.Tensor, cap: float) -> tuple[torch.Tensor, Figures]:
    """Weight [G] of decoupled PPO, min(pi_anchor / pi_behaviour, cap), and its figures (AReaL, arXiv 2505.24298).

    Both are mean log-probs [G], so the weight is the likelihood ratio of a whole step tempered by 1 / d, as all ratios
    are here: it stays near 1 and the cap guards against accidents rather than binding.
    """
    with torch.no_grad():
        ratio = torch.exp(anchor - behaviour)
        weight = ratio.clamp(max=cap)
        figures = {"weight_mean": weight.mean().item(), "weight_capped": (ratio > cap).float().mean().item()}
    return weight, figures


def step_kl(mean: torch.Tensor, anchor: torch.Tensor, sigma: float) -> torch.Tensor:
    """KL [G] of two steps with the same noise, mean over d: mean_d (mu - mu_old)^2 / (2 sigma^2); exact."""
    return ((mean - anchor) ** 2).flatten(1).mean(1) / (2.0 * sigma * sigma)


def guarded_log_ratio(mean: torch.Tensor, anchor: torch.Tensor, x_prev: torch.Tensor, sigma: float) -> torch.Tensor:
    """GRPO-Guard's log-ratio [G], mean_d (mu - mu_old) z with x_prev = mu_old + sigma z (arXiv 2510.22319).

    The plain log-ratio of samples of the anchor has mean -KL < 0, so ratios lie left of 1 and the clip bites on one
    side only. This one equals sigma (log rho + KL) and has mean 0. It is computed from the means, so it is the same
    whatever constants a schedule's log-prob leaves out.
    """
    return ((mean - anchor) * (at_least_float32(x_prev) - anchor)).flatten(1).mean(1) / sigma


def output_gain(stepper: Stepper, i: int) -> float:
    """|d mean / d model output| of step ``i``: what a guarded loss is divided by, so that each step's gradient with
    respect to the model output is A z / d, whatever its noise. Under Flow-GRPO's noise this is the time step of the
    paper times a constant (its weight is 1 / dt); elsewhere it is what that weight is for.

    Raises:
        ConfigError: the step ignores the model output.
    """
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    gain = abs(float(stepper.mean(one, torch.zeros_like(one), i)))
    if gain == 0.0:
        raise ConfigError("objective.ratio", "guarded", f"step {i} ignores the model output: do not train it")
    return gain


def _mean(terms: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return terms.mean() if weight is None else (weight * terms).mean()


def _ratio_figures(log_ratio: torch.Tensor, ratio: torch.Tensor) -> Figures:
    return {
        "ratio_mean": ratio.mean().item(),
        "ratio_max_dev": (ratio - 1.0).abs().max().item(),
        "approx_kl": 0.5 * (log_ratio**2).mean().item(),
    }
