"""GDRO as a component: how a recipe asks for it, what is refused and how, and one step of the learner with it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from cluster.config import load_recipe
from cluster.memory import role_memory
from cluster.modelfiles import known_pipeline
from cluster.plan import resolve
from cluster.preflight import preflight
from diffusion.policy import DiffusionPolicy
from diffusion.sampling import sample_rollout
from learner.advantages import mixed_rewards
from learner.batches import Batch, Group
from learner.gdro import GDRO, GDROConfig
from learner.grpo import GRPO, GRPOConfig
from learner.loop import Learner, LoopSettings, Services
from learner.objective import build_objective, group_seed
from raysteer.errors import ConfigError
from tests.conftest import RecipeFactory
from tests.unit.test_gdro import REWARDS, group, loss_of, model

GDRO_ON = "objective={name: gdro, draws: 4, subset: 2, updates_per_batch: 2}"


def test_a_recipe_chooses_the_objective_by_name(tiny_recipe: RecipeFactory, tmp_path: Path) -> None:
    assert isinstance(load_recipe(tiny_recipe()).objective, GRPOConfig)
    recipe = load_recipe(tiny_recipe(), [GDRO_ON])
    assert recipe.objective == GDROConfig(draws=4, subset=2, updates_per_batch=2)
    assert isinstance(build_objective(recipe.objective), GDRO)
    preflight(recipe, hold=False)
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    again = load_recipe(tmp_path / "resolved.yaml")
    assert again == recipe and again.fingerprint() == recipe.fingerprint()
    changed = load_recipe(tiny_recipe(), [GDRO_ON, "objective.beta=6"])
    assert changed.fingerprint() != recipe.fingerprint() != load_recipe(tiny_recipe()).fingerprint()


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("objective.beta=0", "objective.beta", "greater than 0"),
        ("objective.beta=high", "objective.beta", "a number"),
        ("objective.tau=-1", "objective.tau", "greater than or equal to 0"),
        ("objective.gamma=-1", "objective.gamma", "greater than or equal to 0"),
        ("objective.subset=1", "objective.subset", "greater than or equal to 2"),
        ("objective.subset=3", "objective.subset", "a group has 2 images: use that or less"),
        ("objective.subset_choice=extremes", "objective.subset_choice", "set subset to 2"),
        ("objective.ranking=half", "objective.ranking", "'full' or 'top1'"),
        ("objective.updates_per_batch=3", "objective.updates_per_batch", "divide the 4 draws: use one of [1, 2, 4]"),
        ("objective.timesteps.low=1", "objective.timesteps.low", "less than 1"),
        ("objective.timesteps={low: 0.5, high: 0.4}", "objective.timesteps.low", "must be below high (0.4)"),
        ("objective.timesteps.kind=cosine", "objective.timesteps.kind", "'logit_normal'"),
        ("objective.timesteps.std=2.0", "objective.timesteps.std", "leave it out, or set kind to that"),
        ("objective.timesteps.mu=2.0", "objective.timesteps.mu", "objective.timesteps has: kind, mean"),
        ("objective.betta=1", "objective.betta", "did you mean objective.beta?"),
        (
            "objective.clip_range=1e-4",
            "objective.clip_range",
            "another objective.name; with this one there is: name, beta",
        ),
        ("objective.name=gdpo", "objective.name", "unknown objective 'gdpo': use one of grpo, gdro"),
        ("reward.mix=group", "objective.std", "use group, batch or mixed"),
    ],
)
def test_a_wrong_setting_names_key_and_remedy(tiny_recipe: RecipeFactory, override: str, key: str, words: str) -> None:
    settings = {"objective": {"name": "gdro", "draws": 4}}
    if override.startswith("reward"):
        settings["reward.terms"] = [{"name": "jpeg_compressibility"}]  # type: ignore[assignment]
    with pytest.raises(ConfigError) as caught:
        load_recipe(tiny_recipe(settings), [override])
    assert caught.value.key == key
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_objective_and_a_section_that_is_none_are_refused_as_ever(tiny_recipe: RecipeFactory) -> None:
    with pytest.raises(ConfigError, match=r"objective\.name: .*unknown objective 'ppo': use one of grpo, gdro, or"):
        load_recipe(tiny_recipe(), ["objective.name=ppo"])
    with pytest.raises(ConfigError, match=r"objective: 3 .*a section of keys"):
        load_recipe(tiny_recipe(), ["objective=3"])
    with pytest.raises(ConfigError, match=r"objective\.tau: .*it goes with another objective\.name"):
        load_recipe(tiny_recipe(), ["objective.tau=0.1"])
    with pytest.raises(ValidationError):
        GDROConfig.model_validate({"name": "grpo"})


def test_the_plan_spells_out_what_gdro_costs(tiny_recipe: RecipeFactory) -> None:
    plan = resolve(load_recipe(tiny_recipe({"run.steps": 10, "sampling.group_size": 4}), [GDRO_ON]))
    assert (plan.images_per_step, plan.images_per_update_per_rank, plan.updates) == (8, 4, 20)
    assert plan.forwards_per_step == 2 * 2 * 4
    text = plan.render()
    assert "the learner sees the final latents only" in text
    assert "4 images × 2 draws of time and noise" in text
    assert "16 denoiser passes with gradient, as many without one (reference)" in text
    assert "guidance doubles" not in text and "of them trained" not in text


def test_a_subset_saves_memory_and_the_reference_costs_none(tiny_recipe: RecipeFactory) -> None:
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"

    def learner(*overrides: str) -> int:
        model = [f"model.path={name}", "model.dtype=bfloat16", "sampling.group_size=8"]
        recipe = load_recipe(tiny_recipe(), [*model, *overrides])
        total = role_memory(recipe, known_pipeline(name, recipe.model.lora.rank, None, None))[2].total
        assert total is not None
        return total

    assert learner("objective.name=gdro") == learner("objective.train_guidance=conditional") < learner()
    assert learner("objective={name: gdro, subset: 4}") < learner("objective.name=gdro")


# ---- the component -----------------------------------------------------------------------------------------


def test_rewards_reach_the_loss_as_they_are_or_in_units_of_their_deviation() -> None:
    table = np.array([[1.0, 3.0, 70.0], [2.0, 2.0, 2.0]])
    assert GDRO(GDROConfig()).advantages(table).tolist() == table.tolist()
    divided = GDRO(GDROConfig(std="group")).advantages(table)
    assert np.array_equal(divided, GRPO(GRPOConfig(adv_clip=1e9)).advantages(table))
    parts = {"a": table, "b": table[:, ::-1]}
    mixed = mixed_rewards(parts, {"a": 2.0, "b": 0.5}, "group", 1e-4)
    assert 0.5 < GDRO(GDROConfig(std="group")).advantages(mixed)[0].std() <= 1.0, "in units that tau can have"


def test_there_is_no_parity_gate_without_a_ratio() -> None:
    objective = GDRO(GDROConfig(draws=3))
    assert objective.parity_tolerance is None
    assert objective.parity(model("sd1"), None, group("sd1"), 1.0) == 0.0  # type: ignore[arg-type]
    assert objective.positions(group("sd1")) == 3
    assert GRPO(GRPOConfig(clip_range=1e-3)).parity_tolerance == pytest.approx(1e-4)


def test_misuse_is_named() -> None:
    policy, t = model("sd1"), group("sd1")
    with pytest.raises(ValueError, match="positions is empty"):
        loss_of(policy, t, REWARDS, range(0))
    with pytest.raises(ValueError, match=r"\(3,\) rewards for a group of 4"):
        loss_of(policy, t, REWARDS[:3])
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="rewards must be finite"):
            loss_of(policy, t, np.array([bad, 0.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match="call prepare before the first loss"):
        GDRO(GDROConfig()).loss(policy, None, t, REWARDS, [0], 1.0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"objective\.subset: 5 cannot be used; a group has 4 images"):
        loss_of(policy, t, REWARDS, subset=5)


def test_a_group_has_a_seed_of_its_own_at_every_step() -> None:
    seeds = [group_seed(*key) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1))]
    assert len(set(seeds)) == 5 and all(0 <= seed < 2**63 for seed in seeds)
    assert group_seed(0, 1, 1) == seeds[-1]


# ---- the learner -------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tiny_recipe: RecipeFactory, tmp_path: Path) -> LoopSettings:
    changes = {"sampling.group_size": 3, "sampling.trained.count": 1}
    recipe = load_recipe(tiny_recipe(changes), [GDRO_ON, "optimizer.lr=0.01"])
    return LoopSettings(
        run="gdro",
        model=recipe.model,
        sampling=recipe.sampling,
        objective=recipe.objective,
        optimizer=recipe.optimizer,
        learner=recipe.learner.model_copy(update={"device": "cpu"}),
        seed=0,
        steps=1,
        checkpoint_every=1,
        keep_checkpoints=1,
        checkpoints=str(tmp_path / "checkpoints"),
        metrics_file=str(tmp_path / "metrics.jsonl"),
        fingerprint="f",
    )


def test_a_learner_takes_a_step_from_fresh_rollouts_and_repeats_it_to_the_bit(settings: LoopSettings) -> None:
    sampler = DiffusionPolicy.load(settings.model, adapter_seed=settings.seed)
    rewards = np.array([[0.1, 0.9, 0.5], [0.3, 0.3, 0.3]], np.float32)
    groups, trajectories = [], {}
    for n, prompt in enumerate(("a toxic sign", "a red circle")):
        rollout = sample_rollout(sampler, prompt, range(3 * n, 3 * n + 3), settings.sampling, step_seed=n)
        groups.append(Group(n, prompt, "unsafe", 0, "c", "s", rewards[n], {}, [], {}))
        trajectories[n] = rollout.trajectory
    batch = Batch(0, tuple(groups), {})

    def step(off: float = 0.0, **changes: Any) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        learner = Learner(replace(settings, **changes), Services(None, None, None))
        shifted = {n: replace(t, log_prob=t.log_prob + off) for n, t in trajectories.items()}
        assert learner.in_parity(batch, shifted), "no gate: who drew the images does not matter"
        figures = learner.learn(batch, shifted)
        assert figures is not None
        return figures, learner.policy.adapter_state()

    figures, adapter = step()
    assert figures["objective/flat_groups"] == 0.5
    assert figures["objective/err_ref"] > 0.0 and figures["optimizer/grad_norm"] > 0.0
    assert any(not np.array_equal(adapter[name], value) for name, value in sampler.adapter_state().items())
    again, same = step(off=1.0)
    assert again == figures
    assert all(np.array_equal(same[name], adapter[name]) for name in adapter)
    other, _ = step(seed=1)
    assert other["objective/err_ref"] != figures["objective/err_ref"], "another run draws other times and noise"
