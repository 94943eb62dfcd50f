"""The optimiser continues bit for bit and refuses what is not a number."""

import numpy as np
import pytest
import torch
from torch import nn

from learner.optim import AdapterOptimizer, OptimizerConfig


def parameters() -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return [(name, nn.Parameter(torch.randn(3, 2, generator=generator))) for name in ("a", "b")]


def run(optimizer: AdapterOptimizer, steps: range, scale: float = 1.0) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in optimizer.parameters:
            parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
        optimizer.update()


def test_a_continued_optimiser_is_bit_identical_to_an_uninterrupted_one() -> None:
    cfg = OptimizerConfig(lr=1e-2, warmup_steps=5)
    whole = AdapterOptimizer(parameters(), cfg)
    run(whole, range(8))
    first = AdapterOptimizer(parameters(), cfg)
    run(first, range(3))
    second = AdapterOptimizer(parameters(), cfg)
    for mine, theirs in zip(second.parameters, first.parameters, strict=True):
        mine.data.copy_(theirs.data)
    second.load_state(first.state())
    run(second, range(3, 8))
    for mine, theirs in zip(second.parameters, whole.parameters, strict=True):
        assert torch.equal(mine, theirs)


def test_it_is_plain_adamw_with_global_norm_clipping() -> None:
    cfg = OptimizerConfig(lr=1e-2, max_grad_norm=0.5)
    ours, named = AdapterOptimizer(parameters(), cfg), parameters()
    reference = torch.optim.AdamW([p for _, p in named], lr=1e-2, weight_decay=cfg.weight_decay)
    for step in range(4):
        run(ours, range(step, step + 1), scale=3.0)
        generator = torch.Generator().manual_seed(step)
        for _, parameter in named:
            parameter.grad = 3.0 * torch.randn(parameter.shape, generator=generator)
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 0.5)
        reference.step()
    for mine, (_, theirs) in zip(ours.parameters, named, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_the_rate_warms_up_linearly_and_then_stays() -> None:
    optimizer = AdapterOptimizer(parameters(), OptimizerConfig(lr=1.0, warmup_steps=4))
    rates = []
    for step in range(6):
        rates.append(optimizer.lr)
        run(optimizer, range(step, step + 1))
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_gradient_that_is_not_a_number_changes_nothing() -> None:
    optimizer = AdapterOptimizer(parameters(), OptimizerConfig())
    before = [parameter.detach().clone() for parameter in optimizer.parameters]
    optimizer.parameters[0].grad = torch.full((3, 2), float("nan"))
    with pytest.raises(FloatingPointError, match="nan"):
        optimizer.update()
    assert all(torch.equal(a, b) for a, b in zip(before, optimizer.parameters, strict=True))
    assert optimizer.updates == 0


def test_a_parameter_without_gradient_counts_as_zero_gradient() -> None:
    optimizer = AdapterOptimizer(parameters(), OptimizerConfig())
    optimizer.parameters[0].grad = torch.ones(3, 2)
    assert np.isfinite(optimizer.update())
