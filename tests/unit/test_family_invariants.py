"""What holds of every family: fresh ratios are 1, gradients are the policy's, an adapter means the same everywhere."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch

from diffusion.adapters import WEIGHTS_NAME, save_adapter
from diffusion.families.flux import pack
from diffusion.policy import DiffusionPolicy
from diffusion.sampling import SamplingConfig, TrainedStepsConfig, Trajectory, generate, sample_rollout
from diffusion.steps import LinearGaussian, StepOutput
from learner.grpo import GRPO, GRPOConfig
from learner.replay import replay
from tests.policies import PROMPT, Drawn, difference, drawn, gradient, restored, score
from tests.tiny import tiny_pipeline
from tests.tiny_flow import RESOLUTION, tiny_flux, tiny_sd3
from tests.tiny_unet import tiny_sd2, tiny_sdxl

STEPS, GROUP = 5, 4
GATE = 0.1 * GRPOConfig().clip_range  # the deviation from 1 at which a run is stopped
ADVANTAGES = np.array([1.0, -1.0, 0.5, -2.0], np.float32)
POSITIONS = [1, 3]


class Model(NamedTuple):
    """A family's tiny model and how it is used."""

    folder: Callable[[], Path]
    guidance: float
    resolution: int | None = None


MODELS = {
    "sd1": Model(tiny_pipeline, 5.0),
    "sd2-v": Model(tiny_sd2, 5.0),
    "sdxl": Model(tiny_sdxl, 5.0),
    "sd3": Model(tiny_sd3, 4.5),
    "flux": Model(tiny_flux, 3.5, RESOLUTION),
}
every_family = pytest.mark.parametrize("name", MODELS)


@functools.cache
def sampling(name: str) -> SamplingConfig:
    trained = TrainedStepsConfig(mode="all")
    return SamplingConfig(steps=STEPS, group_size=GROUP, guidance_scale=MODELS[name].guidance, trained=trained)


def fresh(name: str, dtype: str = "float32") -> Drawn:
    """A policy off its base model and a group it has just drawn. Shared: do not change it."""
    return drawn(MODELS[name].folder(), sampling(name), dtype, resolution=MODELS[name].resolution)


@functools.cache
def other(name: str) -> DiffusionPolicy:
    """The same model loaded again as a learner might: another adapter, and gradient checkpointing."""
    config = fresh(name).policy.config.model_copy(update={"gradient_checkpointing": True})
    return DiffusionPolicy.load(config, adapter_seed=5)


@contextmanager
def with_adapter_of(policy: DiffusionPolicy, source: DiffusionPolicy) -> Iterator[DiffusionPolicy]:
    """``policy`` with the adapter of ``source`` inside."""
    state = policy.adapter_state()
    policy.load_adapter(source.adapter_state())
    try:
        yield policy
    finally:
        policy.load_adapter(state)


def parity(made: Drawn, name: str, policy: DiffusionPolicy | None = None, t: Trajectory | None = None) -> float:
    """Largest deviation of a ratio from 1, for the fresh group under the policy that drew it unless said otherwise."""
    trajectory = made.rollout.trajectory if t is None else t
    return GRPO(GRPOConfig()).parity(policy or made.policy, made.stepper, trajectory, MODELS[name].guidance)


def loss_of(
    made: Drawn, name: str, advantages: np.ndarray, t: Trajectory | None = None, **objective: Any
) -> tuple[torch.Tensor, dict[str, float]]:
    trajectory = made.rollout.trajectory if t is None else t
    grpo = GRPO(GRPOConfig(**objective))
    return grpo.loss(made.policy, made.stepper, trajectory, advantages, POSITIONS, MODELS[name].guidance)


def some(t: Trajectory, which: Any) -> Trajectory:
    """The images ``which`` of a group."""
    return replace(t, x_t=t.x_t[which], x_prev=t.x_prev[which], log_prob=t.log_prob[which])


# ---- replay ------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_ratio_is_exactly_one_on_fresh_data_at_every_trained_step(name: str, dtype: str) -> None:
    made = fresh(name, dtype)
    assert made.rollout.trajectory.step_index.tolist() == list(range(STEPS - 1))
    assert made.rollout.trajectory.dtype == dtype
    assert parity(made, name) == 0.0
    _, stats = loss_of(made, name, ADVANTAGES)  # with gradients on, too
    assert stats["ratio_mean"] == 1.0
    assert stats["ratio_max_dev"] == stats["clip_fraction"] == stats["approx_kl"] == 0.0


@every_family
def test_scoring_before_rounding_to_bfloat16_breaks_the_parity_gate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The must-fail twin: the flaw of the published code, in the sampler."""
    policy, _, _ = made = fresh(name, "bfloat16")
    take = LinearGaussian.step

    def score_then_round(self: Any, output: Any, x: Any, i: int, noise: Any, dtype: torch.dtype) -> StepOutput:
        step = take(self, output, x, i, noise, torch.float32)
        return replace(step, x_prev=step.x_prev.to(dtype))

    monkeypatch.setattr(LinearGaussian, "step", score_then_round)
    flawed = sample_rollout(policy, PROMPT, range(GROUP), sampling(name), step_seed=0).trajectory
    assert parity(made, name, t=flawed) > GATE
    assert np.array_equal(flawed.x_t, made.rollout.trajectory.x_t)  # the images are the same, only the scores are not


@every_family
def test_another_guidance_scale_or_another_prompt_breaks_parity(name: str) -> None:
    policy, stepper, rollout = made = fresh(name)
    other_guidance = GRPO(GRPOConfig()).parity(policy, stepper, rollout.trajectory, MODELS[name].guidance + 0.5)
    assert other_guidance > GATE
    assert parity(made, name, t=replace(rollout.trajectory, prompt="a red circle")) > GATE


@every_family
def test_a_policy_that_reloaded_the_adapter_replays_exactly(name: str) -> None:
    made, learner = fresh(name), other(name)
    assert parity(made, name, learner) > GATE
    with with_adapter_of(learner, made.policy):
        assert parity(made, name, learner) == 0.0


@every_family
def test_a_mixed_schedule_trains_its_noisy_window_with_ratio_one(name: str) -> None:
    policy, _, _ = made = fresh(name)
    trained = TrainedStepsConfig(mode="sliding", count=2, every=1)
    cfg = sampling(name).model_copy(update={"mixed": True, "trained": trained})
    groups = [sample_rollout(policy, PROMPT, range(GROUP), cfg, 0, step).trajectory for step in range(2)]
    assert [t.step_index.tolist() for t in groups] == [[0, 1], [1, 2]]
    assert [parity(made, name, t=t) for t in groups] == [0.0, 0.0]
    same_start = torch.from_numpy(groups[0].x_t[:, 0] - made.rollout.trajectory.x_t[:, 0])
    assert (same_start == 0).all()


# ---- gradients ---------------------------------------------------------------------------------------------


@every_family
def test_the_first_gradient_is_the_policy_gradient(name: str) -> None:
    policy, stepper, rollout = made = fresh(name)
    loss, _ = loss_of(made, name, ADVANTAGES)
    log_prob = [replay(policy, stepper, rollout.trajectory, k, MODELS[name].guidance)[0] for k in POSITIONS]
    expected = gradient(policy, -(torch.from_numpy(ADVANTAGES) * torch.stack(log_prob)).mean())
    assert expected.norm() > 1e-6
    assert difference(expected, gradient(policy, loss)) <= 1e-5
    stale, _ = loss_of(made, name, ADVANTAGES, replace(rollout.trajectory, log_prob=rollout.trajectory.log_prob - 1))
    assert difference(expected, gradient(policy, stale)) > 0.1  # the must-fail twin: other old log-probs


@every_family
def test_the_first_gradient_agrees_with_finite_differences_in_float64(name: str) -> None:
    policy, stepper, rollout = made = fresh(name)
    t, guidance = rollout.trajectory, MODELS[name].guidance
    t = replace(t, x_t=t.x_t.astype(np.float64), x_prev=t.x_prev.astype(np.float64), dtype="float64")
    # the transformers' norms and rotary positions are float32 in every dtype: a wider difference drowns their rounding
    h, tolerance = (1e-4, 1e-4) if policy.family.component == "unet" else (1e-2, 1e-2)
    try:
        policy.denoiser.double()
        policy.dtype = torch.float64
        own = score(policy, stepper, t, range(STEPS - 1), guidance).numpy().T.copy()
        grad = gradient(policy, loss_of(made, name, ADVANTAGES, replace(t, log_prob=own))[0])
        parameters = policy.trainable_parameters()
        start = torch.nn.utils.parameters_to_vector(parameters).detach().clone()
        # among the larger entries: a difference of losses says little about the smallest
        large = torch.nonzero(grad.abs() > grad.abs().quantile(0.9)).flatten().numpy()
        for entry in np.random.default_rng(0).choice(large, 3, replace=False).tolist():
            values = []
            for sign in (1.0, -1.0):
                point = start.clone()
                point[entry] += sign * h
                torch.nn.utils.vector_to_parameters(point, parameters)
                log_prob = score(policy, stepper, t, POSITIONS, guidance)
                values.append(-(torch.from_numpy(ADVANTAGES) * log_prob).mean().item())
            assert (values[0] - values[1]) / (2 * h) == pytest.approx(grad[entry].item(), rel=tolerance), entry
        torch.nn.utils.vector_to_parameters(start, parameters)
    finally:
        policy.denoiser.float()
        policy.dtype = torch.float32
    assert parity(made, name) == 0.0  # and back again


@every_family
def test_the_order_of_images_and_micro_batches_change_neither_loss_nor_gradient(name: str) -> None:
    policy, _, rollout = made = fresh(name)
    t = rollout.trajectory
    whole, _ = loss_of(made, name, ADVANTAGES, kl_coef=0.1)
    expected = gradient(policy, whole)
    order = np.array([2, 0, 3, 1])
    permuted, _ = loss_of(made, name, ADVANTAGES[order], some(t, order), kl_coef=0.1)
    assert permuted.item() == pytest.approx(whole.item(), abs=1e-6)
    assert difference(expected, gradient(policy, permuted)) <= 1e-5
    value, total = 0.0, torch.zeros_like(expected)
    for part in (slice(0, 2), slice(2, 4)):
        loss, _ = loss_of(made, name, ADVANTAGES[part], some(t, part), kl_coef=0.1)
        value, total = value + loss.item() / 2, total + gradient(policy, loss / 2)
    assert value == pytest.approx(whole.item(), abs=1e-6)
    assert difference(expected, total) <= 1e-5


@every_family
def test_equal_rewards_give_exactly_no_gradient(name: str) -> None:
    made = fresh(name)
    advantages = GRPO(GRPOConfig()).advantages(np.full((1, GROUP), 0.3))[0]
    assert (gradient(made.policy, loss_of(made, name, advantages)[0]) == 0).all()


@every_family
def test_gradient_checkpointing_computes_twice_and_gives_the_same_gradient(name: str) -> None:
    made, learner = fresh(name), other(name)
    calls: list[str] = []
    expected = gradient(made.policy, loss_of(made, name, ADVANTAGES)[0])
    module_name, module = next((n, m) for n, m in learner.denoiser.named_modules() if n.endswith("to_q.lora_A.default"))
    handle = module.register_forward_hook(lambda *_: calls.append(module_name))
    try:
        with with_adapter_of(learner, made.policy):
            loss, stats = loss_of(made._replace(policy=learner), name, ADVANTAGES)
            assert stats["ratio_max_dev"] == 0.0
            assert difference(expected, gradient(learner, loss)) <= 1e-6
    finally:
        handle.remove()
    assert len(calls) == 2 * len(POSITIONS)


# ---- the reference -----------------------------------------------------------------------------------------


@every_family
def test_kl_to_the_reference_is_zero_without_the_adapter_and_not_with_it(name: str) -> None:
    made = fresh(name)
    _, stats = loss_of(made, name, ADVANTAGES, kl_coef=1.0)
    assert stats["kl_ref"] > 1e-6
    with made.policy.adapter_disabled():
        _, stats = loss_of(made, name, ADVANTAGES, kl_coef=1.0)
    assert stats["kl_ref"] == 0.0


@every_family
def test_kl_to_the_reference_is_zero_with_zero_gradient_at_the_start(name: str) -> None:
    with restored(fresh(name)) as made:
        for parameter_name, parameter in made.policy.named_trainable_parameters():
            if ".lora_B." in parameter_name:  # as every new adapter begins
                parameter.data.zero_()
        loss, stats = loss_of(made, name, np.zeros(GROUP, np.float32), kl_coef=1.0)
        assert loss.item() == stats["kl_ref"] == 0.0
        assert (gradient(made.policy, loss) == 0).all()


# ---- the adapter outside -----------------------------------------------------------------------------------


@every_family
def test_plain_diffusers_draws_the_same_images_from_the_saved_adapter(name: str, tmp_path: Path) -> None:
    model, policy = MODELS[name], fresh(name).policy
    prompts, seeds = ["a toxic sign", "a red circle"], [1, 2]
    save_adapter(policy.adapter_state(), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [WEIGHTS_NAME]
    pipe = diffusers.DiffusionPipeline.from_pretrained(model.folder(), local_files_only=True)
    if policy.family.component == "unet":
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    latents = torch.stack(
        [torch.randn(policy.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    call: dict[str, Any] = {"latents": latents, "num_inference_steps": 4, "guidance_scale": model.guidance}
    if name == "flux":
        call |= {"latents": pack(latents), "height": RESOLUTION, "width": RESOLUTION}
    pipe.set_progress_bar_config(disable=True)
    base = pipe(prompts, output_type="np", **call).images
    pipe.load_lora_weights(tmp_path)
    assert pipe.get_list_adapters()  # an adapter with unknown keys loads as nothing, with a mere warning
    theirs = (pipe(prompts, output_type="np", **call).images * 255).round().astype(int)
    ours = generate(policy, prompts, seeds, steps=4, guidance_scale=model.guidance).astype(int)
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(ours - (base * 255).round().astype(int)).max() > 3  # without it they are others


@every_family
def test_what_a_prompt_becomes_does_not_depend_on_what_it_is_encoded_with(name: str) -> None:
    together = fresh(name).policy.encode(["a red circle", PROMPT, ""])
    alone = other(name).encode([PROMPT])
    assert {len(part) for part in together.parts.values()} == {3}
    for part in together.parts:
        assert torch.equal(alone[part][0], together[part][1])
    assert not torch.equal(together["embeds"][0], together["embeds"][1])


@every_family
def test_an_image_does_not_depend_on_the_others_of_its_group(name: str) -> None:
    policy, stepper, rollout = fresh(name)
    x_t, _ = rollout.trajectory.transition(2)
    cond, timestep = policy.encode([PROMPT]), float(stepper.timesteps[2])
    with torch.no_grad():
        together = policy.predict(x_t, timestep, cond.expand(GROUP), MODELS[name].guidance)
        alone = policy.predict(x_t[1:2], timestep, cond, MODELS[name].guidance)
    torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)
