"""Rectified-flow steps: diffusers' Euler without noise, the published SDEs with it, and densities that replay."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from pydantic import ValidationError

from diffusion.flow_steps import (
    ConstantEta,
    FlowCPS,
    FlowNoiseConfig,
    FlowODE,
    FlowSDE,
    flow_sigmas,
    flow_stepper,
)
from diffusion.steps import LinearGaussian
from raysteer.errors import ConfigError, ModelError

UNIFORM = np.linspace(1.0, 0.0, 11)
SD3 = {"shift": 3.0}
FLUX = {"shift": 3.0, "use_dynamic_shifting": True}
KINDS: dict[str, Callable[[np.ndarray], LinearGaussian]] = {
    "sde": lambda times: FlowSDE(times, 0.7),
    "constant": lambda times: ConstantEta(times, 0.3),
    "cps": lambda times: FlowCPS(times, 0.8),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sd3_times(steps: int) -> np.ndarray:
    return flow_sigmas(SD3, steps, 1024)


# ---- times -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 10, 28])
@pytest.mark.parametrize(
    "config",
    [
        {"shift": 1.0},
        SD3,
        {"shift": 1.15},
        FLUX,
        FLUX | {"time_shift_type": "linear", "base_shift": 0.7, "max_shift": 2.0, "max_image_seq_len": 8192},
        FLUX | {"num_train_timesteps": 500},
    ],
)
@pytest.mark.parametrize("image_seq_len", [256, 1024, 4096])
def test_times_are_those_the_pipelines_set(config: dict[str, Any], steps: int, image_seq_len: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    options = {}
    if scheduler.config.use_dynamic_shifting:  # as both pipelines call it
        c = scheduler.config
        options["mu"] = calculate_shift(
            image_seq_len, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift
        )
    train_timesteps = scheduler.config.num_train_timesteps
    for spacing, sigmas in (("scheduler", None), ("uniform", np.linspace(1.0, 1 / steps, steps))):
        scheduler.set_timesteps(None if sigmas is not None else steps, sigmas=sigmas, **options)
        times = flow_sigmas(scheduler.config, steps, image_seq_len, spacing=spacing)  # type: ignore[arg-type]
        assert times.dtype == np.float32
        np.testing.assert_allclose(times, scheduler.sigmas.numpy(), rtol=2e-7)
        np.testing.assert_allclose(FlowODE(times, train_timesteps).timesteps, scheduler.timesteps.numpy(), rtol=2e-7)


def test_a_terminal_shift_ends_the_last_step_where_the_scheduler_does() -> None:
    times = flow_sigmas(FLUX | {"shift_terminal": 0.1}, 8, 1024)
    assert times[-2:] == pytest.approx([0.1, 0.0])
    with np.errstate(invalid="ignore"), pytest.raises(ConfigError, match=r"sampling\.steps: 1 "):  # diffusers has NaN
        flow_sigmas(FLUX | {"shift_terminal": 0.1}, 1, 1024)


@pytest.mark.parametrize("config", [{}, SD3, FLUX])
def test_a_shift_of_the_recipe_takes_the_place_of_the_schedulers_own(config: dict[str, Any]) -> None:
    given = FlowMatchEulerDiscreteScheduler(**config).config  # as a loaded pipeline has it, with diffusers' bookkeeping
    expected = flow_sigmas({"shift": 2.0}, 10, 1024, spacing="uniform")
    assert np.array_equal(flow_sigmas(given, 10, 1024, shift=2.0, spacing="uniform"), expected)
    assert not np.array_equal(flow_sigmas(given, 10, 1024, spacing="uniform"), expected)
    uniform = flow_sigmas(given, 10, 1024, shift=1.0, spacing="uniform")
    np.testing.assert_allclose(uniform, UNIFORM, atol=1e-7)


@pytest.mark.parametrize(
    "key", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling"]
)
def test_scheduler_options_we_do_not_reproduce_are_refused_by_name(key: str) -> None:
    with pytest.raises(ModelError, match=f"^scheduler: {key} is not supported; set {key} to false"):
        flow_sigmas(SD3 | {key: True}, 10, 1024)


def test_impossible_schedules_are_refused_by_key() -> None:
    with pytest.raises(ModelError, match="FlowMatchHeunDiscreteScheduler is not a rectified-flow scheduler we know"):
        config = dict(FlowMatchHeunDiscreteScheduler().config)
        flow_sigmas(config | {"_class_name": "FlowMatchHeunDiscreteScheduler"}, 10, 1024)
    with pytest.raises(ConfigError, match=r"^sampling\.steps: 0 "):
        flow_sigmas(SD3, 0, 1024)
    for shift in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"^sampling\.shift: "):
            flow_sigmas(SD3, 10, 1024, shift=shift)
    for times in ([1.0], [1.0, 1.0, 0.0], [0.0, 1.0], [2.0, 1.0, 0.0], [1.0, -0.5]):
        with pytest.raises(ValueError, match="time"):
            FlowODE(np.array(times))


# ---- steps without noise -----------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [FlowODE, *(lambda t, k=k: k(t, 0.0) for k in (FlowSDE, ConstantEta, FlowCPS))])
@pytest.mark.parametrize("steps", [1, 10, 50])
def test_without_noise_every_kind_is_the_euler_step_of_diffusers(build: Any, steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**SD3)
    scheduler.set_timesteps(steps)
    stepper = build(sd3_times(steps))
    assert (stepper.sigmas == 0.0).all()
    x, v = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(v, t, x).prev_sample
        ours = stepper.step(v, x, i, None, torch.float32)
        assert ours.log_prob is None
        assert (ours.x_prev - theirs).abs().max() <= 1e-6, i


def test_a_configuration_gives_its_kind_and_without_noise_the_ode() -> None:
    for kind, built in (("sde", FlowSDE), ("constant", ConstantEta), ("cps", FlowCPS)):
        flow = FlowNoiseConfig.model_validate({"kind": kind, "level": 0.5})
        stepper, expected = flow_stepper(flow, UNIFORM), built(UNIFORM, 0.5)
        assert type(stepper) is built
        assert np.array_equal(stepper.sigmas, expected.sigmas)
        assert (flow_stepper(flow, UNIFORM, deterministic=True).sigmas == 0.0).all()
        with pytest.raises(ValueError, match="deterministic"):
            x = randn(1, 4, 8, 8)
            flow_stepper(flow, UNIFORM, deterministic=True).log_prob(x, x, x, 3)


# ---- the SDEs ----------------------------------------------------------------------------------------------


def test_flow_sde_is_the_published_formula_with_the_published_noise() -> None:
    stepper = FlowSDE(UNIFORM, 0.7)
    published = [0.70, 0.66, 0.44, 0.34, 0.27, 0.22, 0.18, 0.145, 0.11, 0.074]
    np.testing.assert_allclose(stepper.sigmas, published, atol=6e-3)
    x, v = randn(2, 4, 8, 8).double(), randn(2, 4, 8, 8, seed=1).double()
    for i, (t, t_prev) in enumerate(pairwise(UNIFORM)):
        dt = t_prev - t
        sigma = 0.7 * np.sqrt(t / (1 - (UNIFORM[1] if t == 1.0 else t)))
        mean = x * (1 + sigma**2 / (2 * t) * dt) + v * (1 + sigma**2 * (1 - t) / (2 * t)) * dt
        torch.testing.assert_close(stepper.mean(v, x, i), mean, rtol=1e-12, atol=1e-12)
        assert stepper.sigmas[i] == pytest.approx(sigma * np.sqrt(-dt), rel=1e-6)


def test_constant_eta_is_the_published_formula_and_the_flow_sde_of_the_same_noise() -> None:
    eta, x, v = 0.3, randn(2, 4, 8, 8).double(), randn(2, 4, 8, 8, seed=1).double()
    stepper = ConstantEta(UNIFORM, eta)
    for i, (t, t_prev) in enumerate(pairwise(UNIFORM)):
        dt = t_prev - t
        score = -(x - (1 - t) * (x - t * v)) / t**2
        mean = x + v * dt - 0.5 * eta**2 * score * dt
        torch.testing.assert_close(stepper.mean(v, x, i), mean, rtol=1e-12, atol=1e-12)
        assert stepper.sigmas[i] == pytest.approx(eta * np.sqrt(-dt), rel=1e-6)
        below_one = UNIFORM[1] if t == 1.0 else t
        same = FlowSDE(UNIFORM, eta * np.sqrt((1 - below_one) / t))  # the level at which sigma_t is eta here
        torch.testing.assert_close(same.mean(v, x, i), mean, rtol=1e-12, atol=1e-12)
        assert same.sigmas[i] == pytest.approx(stepper.sigmas[i], rel=1e-6)


def final_std(stepper: LinearGaussian, times: np.ndarray, data: float) -> float:
    """Standard deviation of the samples when the data are N(0, data^2) and v is exact: every step is linear in x."""
    one, zero, variance = torch.ones(1).double(), torch.zeros(1).double(), 1.0
    for i, t in enumerate(times[:-1]):
        velocity = (t - (1 - t) * data**2) / ((1 - t) ** 2 * data**2 + t**2)  # E[x1 - x0 | x_t] / x_t
        factor = (stepper.mean(zero, one, i) + velocity * stepper.mean(one, zero, i)).item()
        variance = factor**2 * variance + float(stepper.sigmas[i]) ** 2
    return variance**0.5


def test_the_flow_sde_preserves_the_marginals_of_gaussian_data() -> None:
    times = np.linspace(1.0, 0.0, 51)
    assert final_std(FlowSDE(times, 0.7), times, 0.5) == pytest.approx(0.498, abs=0.005)
    x, stepper = randn(20_000, 1), FlowSDE(times, 0.7)  # and so does the stepper that is really run
    for i, t in enumerate(times[:-1]):
        velocity = (t - (1 - t) * 0.25) / ((1 - t) ** 2 * 0.25 + t**2) * x
        x = stepper.step(velocity.float(), x, i, randn(20_000, 1, seed=1 + i), torch.float32).x_prev
        spread = ((1 - times[i + 1]) ** 2 * 0.25 + times[i + 1] ** 2) ** 0.5
        assert x.std().item() == pytest.approx(spread, rel=0.08), i  # the first steps are coarse
    assert x.std().item() == pytest.approx(0.498, abs=0.01)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (FlowODE, (0.432, 0.484, 0.500)),
        (KINDS["sde"], (0.480, 0.498, 0.502)),
        (KINDS["cps"], (0.352, 0.389, 0.402)),  # does not converge to the data: its noise does not shrink with dt
    ],
)
def test_samples_of_gaussian_data_have_the_known_spread(build: Any, expected: tuple[float, ...]) -> None:
    grids = [np.linspace(1.0, 0.0, n + 1) for n in (10, 50, 1000)]
    found = [final_std(build(times), times, 0.5) for times in grids]
    assert found == pytest.approx(expected, abs=2e-3)


def test_noise_without_its_drift_would_not_preserve_the_marginals() -> None:
    """The must-fail twin: Euler's mean with the SDE's noise."""
    times = np.linspace(1.0, 0.0, 51)
    ode, sde = FlowODE(times), FlowSDE(times, 0.7)
    wrong = LinearGaussian(ode.timesteps, sde.sigmas, np.ones(50), np.diff(times))
    assert final_std(wrong, times, 0.5) > 0.6


@pytest.mark.parametrize("level", [0.0, 0.3, 0.8, 1.0])
def test_cps_keeps_the_coefficients_of_image_and_noise(level: float) -> None:
    times = sd3_times(10).astype(np.float64)
    stepper, unit = FlowCPS(times, level), torch.ones(1).double()
    for i, (t, t_prev) in enumerate(pairwise(times)):
        image = stepper.mean(-unit, (1 - t) * unit, i).item()  # x0 = 1, x1 = 0
        noise = stepper.mean(unit, t * unit, i).item()  # x0 = 0, x1 = 1
        assert image == pytest.approx(1 - t_prev, abs=1e-7)
        assert noise**2 + float(stepper.sigmas[i]) ** 2 == pytest.approx(t_prev**2, abs=1e-6)
        assert stepper.sigmas[i] == pytest.approx(t_prev * np.sin(level * np.pi / 2), abs=1e-6)
    assert stepper.sigmas[-1] == 0.0


@every_kind
@pytest.mark.parametrize("shift", [1.0, 1.15, 3.0, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_no_step_gives_a_nan_not_even_the_first_and_the_last(kind: str, shift: float, steps: int) -> None:
    times = flow_sigmas({"shift": shift}, steps, 1024)
    assert times[0] == pytest.approx(1.0)
    stepper = KINDS[kind](times)
    assert np.isfinite(stepper.sigmas).all()
    assert (stepper.sigmas < 3.0).all()
    x, noise = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=2)
    for i in range(steps):
        v = randn(2, 4, 8, 8, seed=1).requires_grad_()
        step = stepper.step(v, x, i, noise, torch.float32)
        scored = step.mean.sum() if step.log_prob is None else stepper.log_prob(v, x, step.x_prev, i)[0].sum()
        (gradient,) = torch.autograd.grad(scored, v)
        assert all(torch.isfinite(values).all() for values in (step.x_prev, step.mean, scored, gradient)), i
    assert (stepper.sigmas[-1] == 0.0) == (kind == "cps")


def test_a_first_time_that_rounding_left_beside_one_is_one() -> None:
    for first in (1.0 - 6e-8, 1.0 + 1.2e-7):
        beside = UNIFORM.copy()
        beside[0] = first
        np.testing.assert_allclose(FlowSDE(beside, 0.7).sigmas, FlowSDE(UNIFORM, 0.7).sigmas, rtol=1e-5)


# ---- densities ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sde", "constant"])
def test_log_prob_is_the_mean_of_a_normal_log_prob_in_float32(kind: str) -> None:
    stepper = KINDS[kind](sd3_times(10))
    v, x_t, x_prev = (randn(3, 4, 8, 8, seed=s).bfloat16() for s in range(3))
    for i in (0, 5, 9):
        log_prob, mean = stepper.log_prob(v, x_t, x_prev, i)
        expected = torch.distributions.Normal(mean.double(), float(stepper.sigmas[i])).log_prob(x_prev.double())
        assert log_prob.dtype == mean.dtype == torch.float32
        torch.testing.assert_close(log_prob.double(), expected.flatten(1).mean(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(log_prob.double() * 256, expected.flatten(1).sum(1), rtol=1e-5, atol=1e-3)


def test_the_density_of_cps_is_minus_the_mean_squared_distance() -> None:
    stepper, normal = FlowCPS(UNIFORM, 0.8), KINDS["sde"](UNIFORM)
    v, x_t, x_prev = (randn(3, 4, 8, 8, seed=s).bfloat16() for s in range(3))
    log_prob, mean = stepper.log_prob(v, x_t, x_prev, 4)
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob, -((x_prev.float() - mean) ** 2).mean((1, 2, 3)))
    assert type(normal).density is LinearGaussian.density  # the other kinds have the Gaussian one


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scoring_the_stored_latent_returns_the_stored_log_prob_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    stepper = KINDS[kind](sd3_times(10))
    x, v = randn(4, 4, 8, 8).to(dtype), randn(4, 4, 8, 8, seed=1).to(dtype)
    for i in range(10):
        step = stepper.step(v, x, i, randn(4, 4, 8, 8, seed=i), dtype)
        assert step.x_prev.dtype == dtype
        if stepper.sigmas[i] > 0.0:
            assert step.log_prob is not None
            assert torch.equal(stepper.log_prob(v, x, step.x_prev, i)[0], step.log_prob)


@every_kind
def test_scoring_before_rounding_to_bfloat16_breaks_parity(kind: str) -> None:
    """The must-fail twin: at SD3.5's latent size every step of every kind but CPS leaves the parity gate of 1e-5."""
    stepper = KINDS[kind](sd3_times(10))
    x, v = randn(2, 16, 64, 64), randn(2, 16, 64, 64, seed=1)
    worst = []
    for i in range(9):
        step = stepper.step(v, x, i, randn(2, 16, 64, 64, seed=2 + i), torch.float32)
        replayed, _ = stepper.log_prob(v, x, step.x_prev.bfloat16(), i)
        assert step.log_prob is not None
        worst.append((torch.exp(replayed - step.log_prob) - 1).abs().max().item())
    assert max(worst) > (1e-6 if kind == "cps" else 1e-5)


@pytest.mark.parametrize("kind", ["sde", "constant"])
def test_kl_from_means_is_minus_the_expected_log_ratio_and_the_closed_form(kind: str) -> None:
    times, level = sd3_times(10).astype(np.float64), {"sde": 0.7, "constant": 0.3}[kind]
    stepper = KINDS[kind](times)
    x, v, v_new = (randn(1, 4, 8, 8, seed=s) for s in range(3))
    v_new = v + v_new
    for i in (0, 3, 8):
        t, delta = times[i], times[i] - times[i + 1]
        sigma, old, new = float(stepper.sigmas[i]), stepper.mean(v, x, i), stepper.mean(v_new, x, i)
        kl = ((new - old) ** 2).mean().item() / (2 * sigma**2)
        noise = level * np.sqrt(t / (1 - (times[1] if t == 1.0 else t))) if kind == "sde" else level
        closed = delta / 2 * (noise * (1 - t) / (2 * t) + 1 / noise) ** 2 * ((v_new - v) ** 2).mean().item()
        assert kl == pytest.approx(closed, rel=1e-4)
        drawn = old + sigma * randn(4000, 4, 8, 8, seed=9)
        log_ratio = stepper.density(drawn, new, i) - stepper.density(drawn, old, i)
        error = log_ratio.std().item() / len(log_ratio) ** 0.5
        assert abs(-log_ratio.mean().item() - kl) < 4 * error
        assert error < 0.1 * kl
        centred = sigma * (log_ratio + kl)  # GRPO-Guard's corrected log-ratio: mean zero
        assert abs(centred.mean().item()) < 4 * sigma * error


def test_the_ratio_of_cps_is_tempered_by_twice_its_variance() -> None:
    stepper = FlowCPS(UNIFORM, 0.8)
    x, v, v_new = (randn(1, 4, 8, 8, seed=s) for s in range(3))
    old, new, sigma = stepper.mean(v, x, 4), stepper.mean(v + v_new, x, 4), float(stepper.sigmas[4])
    drawn = old + sigma * randn(4000, 4, 8, 8, seed=9)
    log_ratio = stepper.density(drawn, new, 4) - stepper.density(drawn, old, 4)
    gaussian = LinearGaussian.density(stepper, drawn, new, 4) - LinearGaussian.density(stepper, drawn, old, 4)
    torch.testing.assert_close(log_ratio, 2 * sigma**2 * gaussian, rtol=1e-3, atol=1e-6)
    error = log_ratio.std().item() / len(log_ratio) ** 0.5
    assert abs(-log_ratio.mean().item() - ((new - old) ** 2).mean().item()) < 4 * error


# ---- configuration -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [{"level": 0.0}, {"level": -1.0}, {"level": float("inf")}, {"kind": "ddim"}])
def test_impossible_noise_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        FlowNoiseConfig.model_validate(bad)


def test_levels_that_leave_no_variance_are_refused_by_key() -> None:
    with pytest.raises(ValidationError, match=r"level 1\.2 with kind 'cps' redraws more noise than there is"):
        FlowNoiseConfig(kind="cps", level=1.2)
    with pytest.raises(ConfigError, match=r"^sampling\.flow\.level: 1\.2 .* use at most 1"):
        FlowCPS(UNIFORM, 1.2)
    for build in (FlowSDE, ConstantEta, FlowCPS):
        for level in (-0.1, float("nan"), float("-inf")):
            with pytest.raises(ConfigError, match=r"^sampling\.flow\.level: "):
                build(UNIFORM, level)
