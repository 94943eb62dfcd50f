"""The files on docs/extending.md are complete: they are taken from the page and run."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.config import load_recipe
from cluster.preflight import preflight
from diffusion.policy import DiffusionPolicy
from diffusion.sampling import SamplingConfig, TrainedStepsConfig, sample_rollout
from learner.grpo import GRPO, GRPOConfig
from learner.objective import build_objective
from raysteer.errors import ConfigError
from rewards.base import build_reward
from tests.conftest import RecipeFactory
from tests.policies import GUIDANCE, drawn, gradient, restored

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
BLOCKS = dict(re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "own"
    folder.mkdir()
    for name, text in BLOCKS.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in BLOCKS:
        sys.modules.pop(name, None)


def test_the_page_shows_a_reward_an_objective_and_a_family() -> None:
    assert set(BLOCKS) == {"contrast", "leave_one_out", "latent_consistency"}
    assert all(f"{name}:" in PAGE.read_text(encoding="utf-8") for name in BLOCKS)


def test_the_reward_scores_beside_the_main_one(written: Path, tiny_recipe: RecipeFactory) -> None:
    recipe = load_recipe(tiny_recipe(), ["reward.terms=[{name: 'contrast:Contrast', weight: 0.2}]"])
    preflight(recipe, hold=False)
    images = np.zeros((2, 32, 32, 3), np.uint8)
    images[1, :16] = 255
    scores = build_reward(recipe.reward).score(images, ["a cat", "a cat"])
    assert scores.parts["Contrast"].tolist() == [0.0, 0.5]
    assert np.allclose(scores.total, scores.parts["steering"] + 0.2 * scores.parts["Contrast"])


def test_the_objective_has_the_policy_gradient(written: Path, tiny_recipe: RecipeFactory, tiny_pipeline: Path) -> None:
    recipe = load_recipe(tiny_recipe(), ["objective.name=leave_one_out:LeaveOneOut"])
    preflight(recipe, hold=False)
    objective = build_objective(recipe.objective)
    advantages = objective.advantages(np.array([[1.0, 2.0, 6.0]]))
    assert advantages.tolist() == [[-3.0, -1.5, 4.5]]
    cfg = SamplingConfig(steps=3, group_size=3, guidance_scale=GUIDANCE)
    with restored(drawn(tiny_pipeline, cfg)) as (policy, stepper, rollout):
        group = rollout.trajectory
        assert objective.parity(policy, stepper, group, GUIDANCE) == 0.0
        mine, _ = objective.loss(policy, stepper, group, advantages[0], [0, 1], GUIDANCE)
        theirs, _ = GRPO(GRPOConfig()).loss(policy, stepper, group, advantages[0], [0, 1], GUIDANCE)
        assert torch.allclose(gradient(policy, mine), gradient(policy, theirs), rtol=1e-4, atol=1e-8)  # ratio is 1


@pytest.fixture
def consistency_model(tmp_path: Path, tiny_pipeline: Path) -> Path:
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    plain = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config(dict(plain.unet.config), time_cond_proj_dim=16)
    pipeline = LatentConsistencyModelPipeline(
        vae=plain.vae,
        text_encoder=plain.text_encoder,
        tokenizer=plain.tokenizer,
        unet=unet,
        scheduler=LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(tmp_path / "lcm")
    return tmp_path / "lcm"


def test_the_family_is_that_of_the_scheduler_and_replays(
    written: Path, tiny_recipe: RecipeFactory, consistency_model: Path
) -> None:
    from diffusers import LCMScheduler

    own = [f"model.path={consistency_model}", "model.family=latent_consistency:LatentConsistency"]
    recipe = load_recipe(tiny_recipe(), [*own, "sampling.guidance_scale=8.0"])
    preflight(recipe, hold=False)
    policy = DiffusionPolicy.load(recipe.model)
    cfg = SamplingConfig(steps=4, group_size=2, guidance_scale=8.0, trained=TrainedStepsConfig(mode="all"))
    stepper = policy.stepper(cfg)
    scheduler = LCMScheduler.from_pretrained(consistency_model, subfolder="scheduler")
    scheduler.set_timesteps(4)
    assert stepper.timesteps.tolist() == scheduler.timesteps.tolist()
    x, output = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for i, t in enumerate(scheduler.timesteps):
        taken = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(i))
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        assert torch.allclose(stepper.step(output, x, i, noise, x.dtype).x_prev, taken.prev_sample, atol=1e-5)
    group = sample_rollout(policy, "a red circle", range(2), cfg, step_seed=0).trajectory
    assert group.num_positions == 3  # the last step has no noise
    assert GRPO(GRPOConfig()).parity(policy, stepper, group, 8.0) == 0.0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.family=no_such_module:Family", r"model\.family: .*there is no module 'no_such_module'"),
        ("model.family=latent_consistency:Nothing", r"model\.family: .*has no 'Nothing'"),
        ("model.family=Family", r"model\.family: .*module:Class"),
        ("objective.name=no_such_module:Loss", r"objective\.name: .*there is no module 'no_such_module'"),
        ("objective.name=ppo", r"objective\.name: .*unknown objective 'ppo'"),
    ],
)
def test_a_wrong_path_is_one_line_before_a_start(
    written: Path, tiny_recipe: RecipeFactory, override: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        preflight(load_recipe(tiny_recipe(), [override]), hold=False)
