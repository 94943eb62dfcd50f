"""The averaged adapter: its arithmetic, that it continues bit for bit, and that it is what leaves the system."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from cluster.config import load_recipe
from cluster.final import export_adapter
from cluster.source import find_adapter
from cluster.storage import RunFolder
from diffusion.adapters import AdapterState, load_adapter_file
from learner.checkpoint import Checkpoint, checkpoint_path, read_checkpoint, save_checkpoint
from learner.ema import AdapterEMA
from learner.optim import AdapterOptimizer, OptimizerConfig
from tests.conftest import RecipeFactory
from tests.policies import load

DECAYS = (0.0, 0.7, 1.0)


def parameters() -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(0)
    return [(name, nn.Parameter(torch.randn(3, 2, generator=generator))) for name in ("a", "b")]


def train(optimizer: AdapterOptimizer, ema: AdapterEMA, updates: range) -> None:
    for update in updates:
        generator = torch.Generator().manual_seed(update)
        for parameter in optimizer.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.update()
        ema.update()


def test_with_decay_0_it_is_the_adapter_and_with_decay_1_it_never_moves() -> None:
    for decay in DECAYS:
        named = parameters()
        start = {name: parameter.detach().clone().numpy() for name, parameter in named}
        ema = AdapterEMA(named, decay)
        train(AdapterOptimizer(named, OptimizerConfig(lr=0.1)), ema, range(5))
        now = {name: parameter.detach().numpy() for name, parameter in named}
        average = ema.state()
        assert all(np.array_equal(average[name], now[name]) for name in now) == (decay == 0.0)
        assert all(np.array_equal(average[name], start[name]) for name in now) == (decay == 1.0)


def test_it_is_the_geometrically_weighted_mean_of_all_adapters_so_far() -> None:
    named, seen = parameters(), []
    ema = AdapterEMA(named, 0.7)
    optimizer = AdapterOptimizer(named, OptimizerConfig(lr=0.1))
    seen.append(named[0][1].detach().clone())
    for update in range(4):
        train(optimizer, ema, range(update, update + 1))
        seen.append(named[0][1].detach().clone())
    weights = [0.7**4, *(0.3 * 0.7 ** (4 - k) for k in range(1, 5))]
    assert sum(weights) == pytest.approx(1.0)
    expected = sum(weight * value for weight, value in zip(weights, seen, strict=True))
    np.testing.assert_allclose(ema.state()["a"], expected, rtol=1e-5, atol=1e-6)


def test_a_continued_average_is_bit_identical_to_an_uninterrupted_one(tmp_path: Path) -> None:
    whole_named = parameters()
    whole, whole_optimizer = AdapterEMA(whole_named, 0.9), AdapterOptimizer(whole_named, OptimizerConfig(lr=0.1))
    train(whole_optimizer, whole, range(6))
    first_named = parameters()
    first, first_optimizer = AdapterEMA(first_named, 0.9), AdapterOptimizer(first_named, OptimizerConfig(lr=0.1))
    train(first_optimizer, first, range(3))
    adapter = {name: parameter.detach().numpy().copy() for name, parameter in first_named}
    path = save_checkpoint(tmp_path, Checkpoint(3, "f", adapter, first_optimizer.state(), {}, ema=first.state()))
    found = read_checkpoint(path)
    assert found.ema is not None
    named = parameters()
    for name, parameter in named:
        parameter.data.copy_(torch.from_numpy(found.adapter[name]))
    second, optimizer = AdapterEMA(named, 0.9), AdapterOptimizer(named, OptimizerConfig(lr=0.1))
    optimizer.load_state(found.optimizer)
    second.load_state(found.ema)
    train(optimizer, second, range(3, 6))
    for name, average in whole.state().items():
        np.testing.assert_array_equal(second.state()[name], average)


def test_it_takes_no_part_in_what_later_updates_do() -> None:
    named, alone = parameters(), parameters()
    train(AdapterOptimizer(named, OptimizerConfig(lr=0.1)), AdapterEMA(named, 0.9), range(4))
    train(AdapterOptimizer(alone, OptimizerConfig(lr=0.1)), AdapterEMA(parameters(), 0.5), range(4))
    assert all(torch.equal(mine, theirs) for (_, mine), (_, theirs) in zip(named, alone, strict=True))


def test_a_state_of_another_adapter_is_not_taken_in() -> None:
    with pytest.raises(KeyError, match="b"):
        AdapterEMA(parameters(), 0.9).load_state({"a": np.zeros((3, 2), np.float32)})


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0, float("nan")])
def test_a_recipe_cannot_ask_for_an_average_that_never_moves_or_makes_no_sense(decay: float) -> None:
    with pytest.raises(ValidationError):
        OptimizerConfig(ema_decay=decay)


def two_states(pipeline: Path) -> tuple[AdapterState, AdapterState]:
    """A raw adapter and another one to stand for its average."""
    raw = load(pipeline, rank=2).adapter_state()
    return raw, {name: value if name.endswith("alpha") else value + np.float32(0.5) for name, value in raw.items()}


def test_a_checkpoint_with_an_average_exports_the_average_and_one_without_the_adapter(
    tmp_path: Path, tiny_pipeline: Path
) -> None:
    raw, average = two_states(tiny_pipeline)
    run = tmp_path / "run"
    for step, ema, expected in ((1, None, raw), (2, average, average)):
        save_checkpoint(run / "checkpoints", Checkpoint(step, "f", raw, {}, {}, ema=ema))
        for source in (run, checkpoint_path(run / "checkpoints", step)):
            state = find_adapter(source).state
            assert state.keys() == expected.keys()
            assert all(np.array_equal(state[name], expected[name]) for name in expected)


def test_the_final_adapter_of_a_run_is_the_average(tmp_path: Path, tiny_recipe: RecipeFactory) -> None:
    recipe = load_recipe(tiny_recipe({"optimizer.ema_decay": 0.9}))
    raw, average = two_states(Path(recipe.model.path))
    folder = RunFolder(tmp_path / "run").create()
    export_adapter(recipe, folder.adapter, Checkpoint(2, recipe.fingerprint(), raw, {}, {}, ema=average))
    final = load_adapter_file(folder.adapter)
    assert all(np.array_equal(final[name], average[name]) for name in average)
