"""GDRO on real (tiny) diffusion models: what its loss is made of, and which way it moves the adapter."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import softplus

from diffusion.policy import DiffusionPolicy
from diffusion.sampling import Trajectory
from learner.gdro import FIGURES, GDRO, GDROConfig, Lots
from tests.policies import PROMPT, difference, gradient, load, moved
from tests.tiny import tiny_pipeline
from tests.tiny_flow import RESOLUTION, tiny_flux, tiny_sd3

REWARDS = np.array([0.1, 0.9, 0.5, 0.2], np.float32)
SEED = 3
FOLDERS = {"sd1": (tiny_pipeline, None), "sd3": (tiny_sd3, None), "flux": (tiny_flux, RESOLUTION)}
every_model = pytest.mark.parametrize("name", ["sd1", "sd3"])
Loss = tuple[torch.Tensor, dict[str, float]]


@functools.cache
def model(name: str) -> DiffusionPolicy:
    """A policy off its base model. Shared: use ``policy`` to change it."""
    folder, resolution = FOLDERS[name]
    return moved(load(folder(), resolution=resolution), 0.05)


@pytest.fixture
def policy(name: str) -> Iterator[DiffusionPolicy]:
    state = model(name).adapter_state()
    yield model(name)
    model(name).load_adapter(state)


@functools.cache
def group(name: str, size: int = 4) -> Trajectory:
    """Any clean latents make a group."""
    shape = (size, *model(name).latent_shape)
    return Trajectory.of_latents(PROMPT, np.random.default_rng(0).normal(size=shape).astype(np.float32))


def some(t: Trajectory, which: Any) -> Trajectory:
    """The images ``which`` of a group."""
    return Trajectory.of_latents(t.prompt, t.final_latents[which])


def loss_of(
    policy: DiffusionPolicy,
    t: Trajectory,
    rewards: np.ndarray,
    at: range | None = None,
    seed: int = SEED,
    guidance: float = 1.0,
    **settings: Any,
) -> Loss:
    """The loss of a group at the draws ``at`` (all), with the lots of ``seed``; no stepper is needed."""
    objective = GDRO(GDROConfig(**settings))
    lots = objective.prepare(policy, None, t, guidance, seed)  # type: ignore[arg-type]
    positions = range(objective.positions(t)) if at is None else at
    return objective.loss(policy, None, t, rewards, positions, guidance, lots)  # type: ignore[arg-type]


def reset(policy: DiffusionPolicy) -> None:
    """The adapter as every new one begins: it adds nothing."""
    for name, parameter in policy.named_trainable_parameters():
        if ".lora_B." in name:
            parameter.data.zero_()


# ---- the loss ----------------------------------------------------------------------------------------------


@every_model
def test_at_the_reference_all_implicit_rewards_are_0_and_the_loss_counts_images(
    policy: DiffusionPolicy, name: str
) -> None:
    reset(policy)
    loss, figures = loss_of(policy, group(name), REWARDS, gamma=0.0, tau=0.05)
    assert figures["margin"] == 0.0 and figures["accuracy"] == 0.5
    assert loss.item() == pytest.approx(np.log(24.0), rel=1e-6)
    assert figures["err_theta"] == figures["err_ref"] > 0.1
    assert gradient(policy, loss).norm() > 0.0, "from there it learns all the same"


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux"])
def test_the_loss_is_that_of_errors_worked_out_by_hand(policy: DiffusionPolicy, name: str) -> None:
    t, guidance = group(name), 3.5
    _, figures = loss_of(policy, t, REWARDS, guidance=guidance, timesteps={"low": 0.5, "high": 0.5001}, gamma=0.7)
    loss, _ = loss_of(policy, t, REWARDS, guidance=guidance, timesteps={"low": 0.5, "high": 0.5001}, gamma=0.7)
    lots = Lots.draw(GDROConfig(timesteps={"low": 0.5, "high": 0.5001}), 4, SEED)  # type: ignore[arg-type]
    x0, noise = t.latents(), lots.noise(0, np.arange(4), policy.latent_shape)
    assert torch.equal(noise[0], noise[3]), "one noise for all, unless told otherwise"
    time = lots.time[0, 0]
    if policy.family.component == "transformer":
        x_t, target, timestep = (1 - time) * x0 + time * noise, noise - x0, time * 1000
    else:
        alpha = policy.family.pipeline.scheduler.alphas_cumprod[500]
        x_t, target, timestep = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise, noise, 500.0
    scale = guidance if name == "flux" else 1.0  # an input of the denoiser there, and no guidance elsewhere
    with torch.no_grad():
        cond = policy.encode([PROMPT]).expand(4)
        err = ((policy.predict(x_t, timestep, cond, scale) - target) ** 2).mean((1, 2, 3))
        with policy.adapter_disabled():
            reference = ((policy.predict(x_t, timestep, cond, scale) - target) ** 2).mean((1, 2, 3))
    s = -12.0 * (err - reference)
    order, total = [1, 2, 3, 0], 0.0
    for i in range(3):
        left = order[i:]
        q = torch.softmax(torch.from_numpy(REWARDS)[left] / 0.05, 0)
        total += float(torch.logsumexp(s[left], 0) - (q * s[left]).sum())
    assert figures["err_ref"] == pytest.approx(reference.mean().item(), rel=1e-5)
    assert figures["margin"] == pytest.approx((s[1] - s[0]).item(), abs=1e-5)
    assert figures["ranking"] == pytest.approx(total, rel=1e-5)
    assert figures["sft"] == pytest.approx(err[1].item(), rel=1e-5)
    assert loss.item() == pytest.approx(total + 0.7 * err[1].item(), rel=1e-5)


@every_model
def test_diffusion_dpo_is_a_setting(policy: DiffusionPolicy, name: str) -> None:
    dpo: dict[str, Any] = {"subset": 2, "tau": 0.0, "gamma": 0.0, "beta": 100.0}
    loss, figures = loss_of(policy, group(name), REWARDS, subset_choice="extremes", **dpo)
    assert figures["margin"] != 0.0
    assert loss.item() == pytest.approx(softplus(torch.tensor(-figures["margin"])).item(), rel=1e-5)
    two, figures = loss_of(policy, some(group(name), [0, 1]), REWARDS[:2], **dpo)
    assert two.item() == pytest.approx(softplus(torch.tensor(-figures["margin"])).item(), rel=1e-5)
    assert gradient(policy, loss).norm() > 0.0


@every_model
def test_the_order_of_images_does_not_matter_under_the_same_noise(policy: DiffusionPolicy, name: str) -> None:
    order, t = np.array([2, 0, 3, 1]), group(name)
    for rewards in (REWARDS, np.array([0.5, 0.9, 0.5, 0.9], np.float32)):
        whole, _ = loss_of(policy, t, rewards)
        shuffled, _ = loss_of(policy, some(t, order), rewards[order])
        assert shuffled.item() == pytest.approx(whole.item(), abs=1e-5)
        assert difference(gradient(policy, whole), gradient(policy, shuffled)) <= 1e-4


@every_model
def test_draws_one_by_one_add_up_to_all_at_once(policy: DiffusionPolicy, name: str) -> None:
    settings: dict[str, Any] = {"draws": 3, "subset": 3, "shared_noise": False}
    whole, figures = loss_of(policy, group(name), REWARDS, **settings)
    expected, total, parts = gradient(policy, whole), torch.zeros(()), []
    for k in range(3):
        loss, part = loss_of(policy, group(name), REWARDS, range(k, k + 1), **settings)
        total = total + gradient(policy, loss / 3)
        parts.append(part)
    assert figures["margin"] == pytest.approx(np.mean([part["margin"] for part in parts]), abs=1e-6)
    assert len({part["err_ref"] for part in parts}) == 3, "every draw is another"
    assert difference(expected, total) <= 1e-5


@every_model
def test_a_flat_group_costs_no_forward_moves_nothing_and_is_counted(policy: DiffusionPolicy, name: str) -> None:
    calls: list[int] = []
    handle = policy.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        loss, figures = loss_of(policy, group(name), np.full(4, 0.3, np.float32))
    finally:
        handle.remove()
    assert not calls
    assert loss.item() == 0.0 and figures == dict.fromkeys(FIGURES, 0.0) | {"flat_groups": 1.0}
    loss.backward()  # as the loop does with every loss
    assert all(parameter.grad is None for parameter in policy.trainable_parameters())
    one_differs = np.array([0.0, 0.0, 0.0, 1.0], np.float32)
    _, figures = loss_of(policy, group(name), one_differs, subset=2, draws=60)
    assert 0.3 < figures["flat_groups"] < 0.7, "half of the pairs of four leave the fourth out"


# ---- finite differences ------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("settings", [{}, {"subset": 2, "tau": 0.0, "gamma": 0.0}, {"ranking": "top1", "std": "group"}])
def test_the_gradient_agrees_with_finite_differences_in_float64(
    policy: DiffusionPolicy, name: str, settings: dict[str, Any]
) -> None:
    t = group(name)
    rewards = GDRO(GDROConfig(**settings)).advantages(REWARDS[None])[0]
    # the transformer's norms are float32 in every dtype: a wider difference drowns their rounding
    h, tolerance = (1e-4, 1e-4) if policy.family.component == "unet" else (1e-2, 2e-2)
    parameters = policy.trainable_parameters()
    try:
        policy.denoiser.double()
        policy.dtype = torch.float64
        loss, _ = loss_of(policy, t, rewards, **settings)
        assert loss.dtype == torch.float64
        grad = gradient(policy, loss)
        start = torch.nn.utils.parameters_to_vector(parameters).detach().clone()
        large = torch.nonzero(grad.abs() > grad.abs().quantile(0.9)).flatten().numpy()
        for entry in np.random.default_rng(0).choice(large, 3, replace=False).tolist():
            values = []
            for sign in (1.0, -1.0):
                point = start.clone()
                point[entry] += sign * h
                torch.nn.utils.vector_to_parameters(point, parameters)
                values.append(loss_of(policy, t, rewards, **settings)[0].item())
            assert (values[0] - values[1]) / (2 * h) == pytest.approx(grad[entry].item(), rel=tolerance), entry
        torch.nn.utils.vector_to_parameters(start, parameters)
    finally:
        policy.denoiser.float()
        policy.dtype = torch.float32


@every_model
def test_a_step_down_the_loss_raises_the_margin_of_the_best_image(policy: DiffusionPolicy, name: str) -> None:
    reset(policy)
    settings: dict[str, Any] = {"draws": 8, "gamma": 0.0}
    loss, before = loss_of(policy, group(name), REWARDS, **settings)
    grad = gradient(policy, loss)
    start = torch.nn.utils.parameters_to_vector(policy.trainable_parameters()).detach()
    torch.nn.utils.vector_to_parameters(start - 0.1 * grad / grad.norm(), policy.trainable_parameters())
    after, figures = loss_of(policy, group(name), REWARDS, **settings)
    assert after < loss
    assert figures["margin"] > before["margin"] == 0.0 and figures["accuracy"] > 0.5
    assert figures["target_kl"] < before["target_kl"]


# ---- who is trained ----------------------------------------------------------------------------------------


@every_model
def test_the_gradient_reaches_the_adapter_only_and_the_reference_never_changes(
    policy: DiffusionPolicy, name: str
) -> None:
    frozen = {n: p.detach().clone() for n, p in policy.denoiser.named_parameters() if not p.requires_grad}
    before = loss_of(policy, group(name), REWARDS)[1]["err_ref"]
    loss, _ = loss_of(policy, group(name), REWARDS)
    loss.backward()
    named = dict(policy.denoiser.named_parameters())
    assert all(named[n].grad is None for n in frozen)
    assert all(p.grad is not None for p in policy.trainable_parameters())
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            assert parameter.grad is not None
            parameter.data -= 10.0 * parameter.grad
            parameter.grad = None
    _, figures = loss_of(policy, group(name), REWARDS)
    assert figures["err_ref"] == before != figures["err_theta"]
    assert all(torch.equal(named[n], value) for n, value in frozen.items())


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    plain = model("sd3")
    saving = DiffusionPolicy.load(plain.config.model_copy(update={"gradient_checkpointing": True}))
    saving.load_adapter(plain.adapter_state())
    found = [loss_of(who, group("sd3"), REWARDS)[0] for who in (plain, saving)]
    assert found[0].item() == found[1].item()
    assert difference(gradient(plain, found[0]), gradient(saving, found[1])) <= 1e-6


def test_half_precision_weights_leave_scores_and_gradient_in_float32() -> None:
    policy = moved(load(tiny_sd3(), "bfloat16"), 0.05)
    loss, figures = loss_of(policy, group("sd3"), REWARDS)
    assert loss.dtype == torch.float32 and figures["margin"] != 0.0
    assert gradient(policy, loss).dtype == torch.float32


def test_a_group_of_a_rollout_is_a_group_of_latents() -> None:
    """What a sampler stored of how the images came about plays no part."""
    policy, t = model("sd1"), group("sd1")
    stored = np.ones((4, 2, *policy.latent_shape), np.float32)
    online = replace(t, x_t=stored, x_prev=stored, step_index=np.arange(2), log_prob=np.zeros((4, 2), np.float32))
    assert loss_of(policy, online, REWARDS) == loss_of(policy, t, REWARDS)


# ---- what is drawn -----------------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_lots_and_another_draws_others() -> None:
    cfg = GDROConfig(draws=3, shared_time=False, shared_noise=False)
    one, same, other = (Lots.draw(cfg, 5, seed) for seed in (1, 1, 2))
    for name in ("order", "time", "noise_seed"):
        assert np.array_equal(getattr(one, name), getattr(same, name))
        assert not np.array_equal(getattr(one, name), getattr(other, name))
    assert one.order.shape == one.time.shape == one.noise_seed.shape == (3, 5)
    assert (np.sort(one.order) == np.arange(5)).all()
    assert len(np.unique(one.time)) == len(np.unique(one.noise_seed)) == 15
    assert loss_of(model("sd1"), group("sd1"), REWARDS) == loss_of(model("sd1"), group("sd1"), REWARDS)


def test_sharing_gives_one_time_and_one_noise_to_a_draw_and_changes_nothing_else() -> None:
    apart = Lots.draw(GDROConfig(draws=2, shared_time=False, shared_noise=False), 4, seed=0)
    time = Lots.draw(GDROConfig(draws=2, shared_time=True, shared_noise=False), 4, seed=0)
    both = Lots.draw(GDROConfig(draws=2), 4, seed=0)
    assert np.array_equal(time.noise_seed, apart.noise_seed) and np.array_equal(both.order, apart.order)
    assert np.array_equal(time.time, apart.time[:, [0, 0, 0, 0]])
    assert np.array_equal(both.noise_seed, apart.noise_seed[:, [0, 0, 0, 0]])
    assert time.time[0, 0] != time.time[1, 0]
    shape, images = (4, 8, 8), np.arange(4)
    assert torch.equal(both.noise(0, images, shape)[0], both.noise(0, images, shape)[3])
    assert not torch.equal(both.noise(0, images, shape)[0], both.noise(1, images, shape)[0])
    assert not torch.equal(apart.noise(0, images, shape)[0], apart.noise(0, images, shape)[3])
    assert torch.equal(apart.noise(0, np.array([2]), shape)[0], apart.noise(0, images, shape)[2])


def test_a_random_subset_is_without_replacement_and_reaches_every_image() -> None:
    objective = GDRO(GDROConfig(subset=3, draws=50))
    lots = objective.prepare(model("sd1"), None, group("sd1"), 1.0, SEED)  # type: ignore[arg-type]
    chosen = [tuple(objective._images(REWARDS, order)) for order in lots.order]
    assert {len(set(images)) for images in chosen} == {3}
    assert set(chosen) == {(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3)}


def test_between_equal_extremes_chance_decides() -> None:
    objective = GDRO(GDROConfig(subset=2, subset_choice="extremes", draws=50))
    lots = objective.prepare(model("sd1"), None, group("sd1"), 1.0, SEED)  # type: ignore[arg-type]
    rewards = np.array([1.0, 0.0, 1.0, 0.5], np.float32)
    assert {tuple(objective._images(rewards, order)) for order in lots.order} == {(0, 1), (2, 1)}
