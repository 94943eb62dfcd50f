"""Groups: a function of their seeds, trained steps inside the schedule, and only those steps kept."""

import functools
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from pydantic import ValidationError

from cluster.config import load_recipe, trained_count
from diffusion.policy import DiffusionPolicy, LoRAConfig, ModelConfig
from diffusion.sampling import (
    SamplingConfig,
    TrainedStepsConfig,
    array_to_tensor,
    choose_trained_steps,
    eligible_steps,
    generate,
    sample_rollout,
    tensor_to_array,
)
from diffusion.steps import DDIMEta
from raysteer.errors import ConfigError
from tests.tiny import tiny_pipeline
from tests.unit.test_steps import SD1

CFG = SamplingConfig(steps=6, group_size=4, guidance_scale=3.0, trained=TrainedStepsConfig(count=2))
SEEDS = (11, 12, 13, 14)
PROMPT = "a toxic sign"


@pytest.fixture(scope="module")
def policy() -> DiffusionPolicy:
    return DiffusionPolicy.load(ModelConfig(path=str(tiny_pipeline()), lora=LoRAConfig(rank=4, alpha=8.0)))


def sampling(**overrides: object) -> SamplingConfig:
    return SamplingConfig.model_validate(CFG.model_dump() | overrides)


def test_a_group_is_a_function_of_its_seeds(policy: DiffusionPolicy) -> None:
    other_policy = DiffusionPolicy.load(policy.config)
    torch.manual_seed(99)  # the global generator plays no part
    first = sample_rollout(policy, PROMPT, SEEDS, CFG, step_seed=5)
    again = sample_rollout(other_policy, PROMPT, SEEDS, CFG, step_seed=5)
    assert np.array_equal(first.images, again.images)
    for name in ("x_t", "x_prev", "log_prob", "final_latents", "step_index"):
        assert np.array_equal(getattr(first.trajectory, name), getattr(again.trajectory, name)), name


def test_an_image_follows_its_seed_wherever_it_stands_in_the_group(policy: DiffusionPolicy) -> None:
    forward = sample_rollout(policy, PROMPT, SEEDS, CFG, step_seed=5).trajectory
    backward = sample_rollout(policy, PROMPT, SEEDS[::-1], CFG, step_seed=5).trajectory
    np.testing.assert_allclose(forward.final_latents, backward.final_latents[::-1], atol=1e-4)
    assert np.abs(forward.final_latents[0] - forward.final_latents[1]).max() > 0.1


def test_the_noise_does_not_depend_on_which_steps_are_trained(policy: DiffusionPolicy) -> None:
    images = [sample_rollout(policy, PROMPT, SEEDS, CFG, step_seed=seed).images for seed in (1, 2)]
    assert np.array_equal(images[0], images[1])


def test_only_the_trained_transitions_are_kept(policy: DiffusionPolicy) -> None:
    rollout = sample_rollout(policy, PROMPT, SEEDS, CFG, step_seed=5)
    t = rollout.trajectory
    assert rollout.images.shape == (4, 32, 32, 3)
    assert t.x_t.shape == t.x_prev.shape == (4, 2, 4, 8, 8)
    assert t.log_prob.shape == (4, 2)
    assert t.log_prob.dtype == np.float32
    assert t.step_index.tolist() == list(choose_trained_steps(CFG, policy.stepper(CFG), 5))
    assert np.array_equal(policy.decode(t.latents()), rollout.images)


def test_kept_transitions_form_one_chain(policy: DiffusionPolicy) -> None:
    every = sampling(trained={"mode": "all", "last": 6})
    t = sample_rollout(policy, PROMPT, SEEDS, every, step_seed=5).trajectory
    assert t.step_index.tolist() == [0, 1, 2, 3, 4, 5]
    assert np.array_equal(t.x_prev[:, :-1], t.x_t[:, 1:])
    assert np.array_equal(t.x_prev[:, -1], t.final_latents)
    sparse = sample_rollout(policy, PROMPT, SEEDS, CFG, step_seed=5).trajectory
    assert np.array_equal(sparse.x_t, t.x_t[:, sparse.step_index])


def test_same_initial_noise_shares_the_start_but_not_the_way(policy: DiffusionPolicy) -> None:
    every = sampling(trained={"mode": "all"})
    shared = sample_rollout(policy, PROMPT, SEEDS, sampling(**every.model_dump() | {"same_initial_noise": True}), 5)
    own = sample_rollout(policy, PROMPT, SEEDS, every, 5)
    starts = shared.trajectory.x_t[:, 0]
    assert np.array_equal(starts, np.broadcast_to(starts[:1], starts.shape))
    assert np.array_equal(starts[0], own.trajectory.x_t[0, 0])
    assert not np.array_equal(shared.trajectory.final_latents[0], shared.trajectory.final_latents[1])
    assert len(np.unique(own.trajectory.x_t[:, 0], axis=0)) == 4


def test_a_trajectory_is_plain_numpy_and_survives_read_only_memory(policy: DiffusionPolicy) -> None:
    t = sample_rollout(policy, PROMPT, SEEDS, CFG, step_seed=5).trajectory
    copy = pickle.loads(pickle.dumps(t))
    for name in ("x_t", "x_prev", "log_prob", "final_latents"):
        getattr(copy, name).setflags(write=False)
    x_t, x_prev = copy.transition(1)
    assert np.array_equal(x_t.numpy(), t.x_t[:, 1])
    assert np.array_equal(x_prev.numpy(), t.x_prev[:, 1])
    assert np.array_equal(copy.old_log_prob(1).numpy(), t.log_prob[:, 1])


def test_bfloat16_survives_numpy_bit_for_bit() -> None:
    tensor = torch.randn(3, 5).bfloat16()
    array = tensor_to_array(tensor)
    assert array.dtype == np.uint16
    assert torch.equal(array_to_tensor(array, "bfloat16"), tensor)


def test_a_bfloat16_group_is_stored_as_scored() -> None:
    config = ModelConfig(path=str(tiny_pipeline()), dtype="bfloat16", lora=LoRAConfig(rank=4, alpha=8.0))
    policy = DiffusionPolicy.load(config)
    t = sample_rollout(policy, PROMPT, SEEDS, CFG, step_seed=5).trajectory
    assert t.dtype == "bfloat16"
    assert t.x_t.dtype == np.uint16
    assert t.nbytes < 2 * 4 * 3 * 2 * 4 * 8 * 8  # two bytes a number
    assert t.transition(0)[0].dtype == torch.bfloat16
    assert np.isfinite(t.log_prob).all()


def test_evaluation_images_are_those_of_the_plain_pipeline(policy: DiffusionPolicy) -> None:
    prompts, seeds = ["a red circle", "a toxic sign", "a red circle"], [3, 4, 5]
    ours = generate(policy, prompts, seeds, steps=5, guidance_scale=4.0, batch_size=3)
    pipe = policy.family.pipeline
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    start = torch.stack([torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    theirs = pipe(prompts, latents=start, num_inference_steps=5, guidance_scale=4.0, eta=0.0, output_type="np").images
    assert np.abs(ours.astype(int) - (theirs * 255).round().astype(int)).max() <= 1


def test_evaluation_images_do_not_depend_on_the_batch_size(policy: DiffusionPolicy) -> None:
    prompts, seeds = ["a red circle", "a house", "a tree", "a dog", "a cat"], [1, 2, 3, 4, 5]
    whole = generate(policy, prompts, seeds, 4, 3.0, batch_size=16)
    parts = generate(policy, prompts, seeds, 4, 3.0, batch_size=2)
    assert np.abs(whole.astype(int) - parts.astype(int)).max() <= 1
    with pytest.raises(ValueError, match="5 prompts but 4 seeds"):
        generate(policy, prompts, seeds[:4], 4, 3.0)


def test_a_group_of_the_wrong_size_is_a_bug(policy: DiffusionPolicy) -> None:
    with pytest.raises(ValueError, match="3 seeds for a group of 4"):
        sample_rollout(policy, PROMPT, SEEDS[:3], CFG, 0)


# ---- trained steps -----------------------------------------------------------------------------------------


@functools.cache
def schedule(steps: int) -> DDIMEta:
    return DDIMEta.from_scheduler(SD1, steps, 1.0)


def choose(seed: int, steps: int = 50, **trained: object) -> tuple[int, ...]:
    cfg = SamplingConfig(steps=steps, trained=TrainedStepsConfig.model_validate(trained))
    return choose_trained_steps(cfg, schedule(steps), seed)


def test_trained_steps_are_a_pure_function_of_the_seed() -> None:
    assert choose(3, count=5) == choose(3, count=5)
    assert len({choose(seed, count=5) for seed in range(20)}) > 15
    for seed in range(20):
        steps = choose(seed, count=5)
        assert list(steps) == sorted(set(steps))
        assert set(steps) <= set(range(49))


def test_every_eligible_step_is_chosen_equally_often() -> None:
    counts = np.bincount([i for seed in range(1500) for i in choose(seed, steps=10, count=3)], minlength=10)
    assert counts[9] == 0
    assert 400 < counts[:9].min() <= counts[:9].max() < 600  # 500 expected


def test_a_window_is_a_run_of_neighbours_inside_the_range() -> None:
    starts = set()
    for seed in range(60):
        steps = choose(seed, mode="window", count=4, first=2, last=12)
        assert list(steps) == list(range(steps[0], steps[0] + 4))
        assert steps[0] >= 2
        assert steps[-1] < 12
        starts.add(steps[0])
    assert starts == set(range(2, 9))


def test_all_trains_every_step_but_the_last() -> None:
    assert choose(0, mode="all") == tuple(range(49))
    assert choose(0) == tuple(range(49))


def test_steps_with_little_noise_are_never_trained() -> None:
    stepper = schedule(50)
    steps = choose(0, mode="all", min_sigma=0.05, last=50)
    assert steps == tuple(np.flatnonzero(stepper.sigmas >= 0.05))
    assert 48 not in steps  # t=21, sigma .0395: its curvature is fifty times that of a middle step
    tiny_eta = SamplingConfig(eta=0.1, trained=TrainedStepsConfig(mode="all"))
    assert min(stepper.sigmas[list(eligible_steps(tiny_eta, DDIMEta.from_scheduler(SD1, 50, 0.1)))]) >= 0.2 - 1e-6


def test_a_step_without_noise_is_never_trained_even_when_asked_for() -> None:
    noiseless_end = DDIMEta.from_scheduler(SD1 | {"set_alpha_to_one": True}, 10, 1.0)
    assert noiseless_end.sigmas[9] == 0.0
    cfg = SamplingConfig(steps=10, trained=TrainedStepsConfig(mode="all", last=10, min_sigma=1e-30))
    assert choose_trained_steps(cfg, noiseless_end, 0) == tuple(range(9))


@pytest.mark.parametrize("mode", ["random", "window"])
@pytest.mark.parametrize(("fraction", "number"), [(1.0, 49), (0.6, 29), (0.5, 24), (0.1, 5), (0.03, 1), (1e-6, 1)])
def test_a_fraction_trains_that_share_of_the_steps_and_at_least_one(mode: str, fraction: float, number: int) -> None:
    by_fraction = choose(3, mode=mode, fraction=fraction)
    assert len(by_fraction) == number
    assert by_fraction == choose(3, mode=mode, count=number)


def test_a_fraction_follows_the_range_and_the_number_of_steps() -> None:
    assert len(choose(0, steps=20, fraction=0.5)) == 10  # of 19
    assert len(choose(0, fraction=0.5, first=10, last=30)) == 10
    assert set(choose(0, fraction=0.5, first=10, last=30)) <= set(range(10, 30))


def test_a_fraction_of_a_range_with_too_little_noise_trains_what_is_left() -> None:
    assert choose(0, fraction=1.0, min_sigma=0.05) == choose(0, mode="all", min_sigma=0.05) == tuple(range(48))


@pytest.mark.parametrize(
    "trained",
    [
        {"fraction": 1.0},
        {"fraction": 0.4},
        {"fraction": 0.01, "mode": "window"},
        {"fraction": 0.5, "mode": "window", "first": 2, "last": 10},
        {"count": 3},
        {"mode": "all", "last": 8},
        {},
    ],
)
def test_the_recipe_knows_how_many_steps_are_trained(
    tiny_recipe: Callable[..., Path], trained: dict[str, object]
) -> None:
    recipe = load_recipe(tiny_recipe({"sampling.steps": 12, "sampling.trained": trained}))
    assert trained_count(recipe) == len(choose_trained_steps(recipe.sampling, schedule(12), 0))


def test_a_range_in_which_no_step_has_noise_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"sampling\.trained.*lower min_sigma, raise eta or widen"):
        choose(0, min_sigma=0.9)


def test_a_count_above_the_eligible_steps_names_the_number_there_is() -> None:
    with pytest.raises(ConfigError, match=r"sampling\.trained\.count: 49 cannot be used; only 48 steps qualify"):
        choose(0, count=49, min_sigma=0.05)


def test_trained_steps_beyond_another_schedule_are_refused() -> None:
    cfg = SamplingConfig(steps=50, trained=TrainedStepsConfig(last=40))
    with pytest.raises(ConfigError, match=r"sampling\.trained\.last: 40 cannot be used; the schedule has 20 steps"):
        choose_trained_steps(cfg, DDIMEta.from_scheduler(SD1, 20, 1.0), 0)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"steps": 10, "trained": {"last": 11}}, "only 10 steps"),
        ({"steps": 10, "trained": {"first": 9}}, "last trainable step is 8"),
        ({"steps": 10, "trained": {"count": 10}}, "use 9 or less"),
        ({"trained": {"first": 5, "last": 5}}, "must be larger than first"),
        ({"trained": {"mode": "all", "count": 3}}, "leave count out"),
        ({"trained": {"mode": "all", "fraction": 0.5}}, "leave fraction out"),
        ({"trained": {"count": 3, "fraction": 0.5}}, "exclude each other: leave one out"),
        ({"trained": {"fraction": 0.0}}, "greater than 0"),
        ({"trained": {"fraction": 1.01}}, "less than or equal to 1"),
        ({"trained": {"fraction": float("nan")}}, "less than or equal to 1"),
        ({"trained": {"min_sigma": 0.0}}, "greater than 0"),
        ({"eta": 0.0}, "greater than 0"),
        ({"eta": 1.1}, "less than or equal to 1"),
        ({"group_size": 1}, "greater than or equal to 2"),
        ({"step": 10}, "Extra inputs"),
    ],
)
def test_impossible_sampling_settings_are_refused_with_the_remedy(bad: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SamplingConfig.model_validate(bad)
