"""Export: every form is the same model in other hands, carries where it is from, and nothing is overwritten unasked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from cluster.cli import app
from diffusion.adapters import adapter_metadata, checksum, load_adapter_file, save_adapter
from diffusion.policy import DiffusionPolicy, LoRAConfig, ModelConfig
from diffusion.sampling import generate
from learner.checkpoint import Checkpoint, save_checkpoint
from tests.conftest import RecipeFactory
from tests.policies import moved
from tests.tiny import tiny_pipeline
from tests.tiny_flow import RESOLUTION, tiny_flux, tiny_sd3
from tests.tiny_unet import tiny_sdxl

MODELS: dict[str, Callable[[], Path]] = {"sd1": tiny_pipeline, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
every_model = pytest.mark.parametrize("name", MODELS)
PROMPTS, SEEDS = ["a toxic sign", "a red circle"], [1, 2]
# alpha is neither the rank nor a power of two times it: whoever forgets it is found out
RANK, ALPHA = 4, 6.0


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def refused(*arguments: object) -> str:
    """The one line with which a command refuses."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


@pytest.fixture(scope="module")
def trained() -> Callable[[str], DiffusionPolicy]:
    """Policies whose adapter has visibly moved, one a family."""
    made: dict[str, DiffusionPolicy] = {}

    def policy(name: str) -> DiffusionPolicy:
        if name not in made:
            lora = LoRAConfig(rank=RANK, alpha=ALPHA)
            config = ModelConfig(path=str(MODELS[name]()), lora=lora, resolution=RESOLUTION)
            made[name] = moved(DiffusionPolicy.load(config), 0.2)
        return made[name]

    return policy


def make_run(folder: Path, recipe: Path, policy: DiffusionPolicy) -> Path:
    """What a finished run leaves behind, as far as an export reads it."""
    run = folder / "runs" / "tiny"
    state = policy.adapter_state()
    save_adapter(state, run / "adapter", {"run": "tiny", "step": "9", "checksum": checksum(state)})
    (run / "recipe.yaml").write_bytes(recipe.read_bytes())
    return run


def images(policy: DiffusionPolicy) -> np.ndarray:
    return generate(policy, PROMPTS, SEEDS, steps=3, guidance_scale=3.0).astype(int)


def plain(folder: Path, **options: Any) -> Any:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---- the same model -------------------------------------------------------------------------------------------------


@every_model
def test_a_merged_pipeline_draws_what_base_and_adapter_draw(
    name: str, trained: Callable[[str], DiffusionPolicy], tiny_recipe: RecipeFactory, tmp_path: Path
) -> None:
    policy = trained(name)
    run = make_run(tmp_path, tiny_recipe({"model.path": str(MODELS[name]())}), policy)
    result = invoke(run, tmp_path / "merged", "--to", "merged")
    assert result.exit_code == 0, result.output
    assert f'DiffusionPipeline.from_pretrained("{tmp_path / "merged"}")' in result.stdout
    merged = DiffusionPolicy.load(policy.config.model_copy(update={"path": str(tmp_path / "merged")}))
    expected = images(policy)
    assert np.abs(images(merged) - expected).max() <= 1
    with policy.adapter_disabled():
        assert np.abs(images(policy) - expected).max() > 8  # or nothing has been tested


@every_model
def test_the_diffusers_form_is_the_adapter_in_every_family(
    name: str, trained: Callable[[str], DiffusionPolicy], tmp_path: Path
) -> None:
    policy = trained(name)
    save_adapter(policy.adapter_state(), tmp_path / "run" / "adapter")
    assert invoke(tmp_path / "run", tmp_path / "out").exit_code == 0
    assert_same_model(policy, tmp_path / "out")


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_the_kohya_form_is_the_adapter(name: str, trained: Callable[[str], DiffusionPolicy], tmp_path: Path) -> None:
    policy = trained(name)
    save_adapter(policy.adapter_state(), tmp_path / "run" / "adapter", {"run": "mine"})
    result = invoke(tmp_path / "run", tmp_path / "out", "--to", "kohya")
    assert result.exit_code == 0, result.output
    file = tmp_path / "out" / "mine.safetensors"
    assert f'pipe.load_lora_weights("{file}")' in result.stdout
    assert list(file.parent.iterdir()) == [file]
    assert_same_model(policy, file)


@torch.no_grad()
def assert_same_model(policy: DiffusionPolicy, lora: Path) -> None:
    """Plain diffusers with this LoRA predicts what the policy predicts, to the bit."""
    pipe = plain(Path(policy.config.path))
    pipe.load_lora_weights(str(lora))
    assert pipe.get_list_adapters()  # an adapter with unknown keys loads as nothing, with a mere warning
    theirs = type(policy.family)(pipe, RESOLUTION)  # type: ignore[call-arg]
    x = torch.randn((2, *policy.latent_shape), generator=torch.Generator().manual_seed(3))
    cond = policy.encode(PROMPTS)
    expected = policy.family.denoise(x, 501.0, cond, 3.0)
    assert torch.equal(theirs.denoise(x, 501.0, cond, 3.0), expected)
    with policy.adapter_disabled():
        assert (policy.family.denoise(x, 501.0, cond, 3.0) - expected).abs().max() > 0.01


def test_plain_diffusers_draws_the_same_image_from_every_form(
    trained: Callable[[str], DiffusionPolicy], tiny_recipe: RecipeFactory, tmp_path: Path
) -> None:
    """The whole way of a user: fp32, the same seed, ``pipe(prompt)``."""
    policy = trained("sd1")
    run = make_run(tmp_path, tiny_recipe(), policy)
    for form in ("diffusers", "kohya", "merged"):
        assert invoke(run, tmp_path / form, "--to", form).exit_code == 0
    base = Path(policy.config.path)
    start = torch.stack([torch.randn((4, 8, 8), generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    drawn = {}
    for form in ("base", "diffusers", "kohya", "merged"):
        pipe = plain(tmp_path / "merged" if form == "merged" else base)
        if form in ("diffusers", "kohya"):
            pipe.load_lora_weights(str(tmp_path / "kohya" / "tiny.safetensors" if form == "kohya" else tmp_path / form))
        pictures = pipe(PROMPTS, latents=start, num_inference_steps=3, guidance_scale=3.0, output_type="np").images
        drawn[form] = (pictures * 255).round().astype(int)
    ours = images(policy)
    assert np.abs(drawn["diffusers"] - ours).max() <= 1
    assert np.array_equal(drawn["kohya"], drawn["diffusers"])
    assert np.abs(drawn["merged"] - ours).max() <= 1
    assert np.abs(drawn["base"] - ours).max() > 8


def test_every_form_says_where_it_is_from(
    trained: Callable[[str], DiffusionPolicy], tiny_recipe: RecipeFactory, tmp_path: Path
) -> None:
    policy = trained("sd1")
    run = make_run(tmp_path, tiny_recipe(), policy)
    expected = {"run": "tiny", "step": "9", "checksum": checksum(policy.adapter_state())}
    for form in ("diffusers", "kohya", "merged"):
        assert invoke(run, tmp_path / form, "--to", form).exit_code == 0
    for form in ("diffusers", "kohya"):
        assert adapter_metadata(tmp_path / form) == expected
        assert checksum(load_adapter_file(tmp_path / form)) == expected["checksum"]
    note = json.loads((tmp_path / "merged" / "raysteer.json").read_text(encoding="utf-8"))
    assert note == expected | {"base_model": policy.config.path, "rank": "4", "alpha": "6"}


def test_an_unfinished_run_gives_its_newest_checkpoint_with_run_and_step(
    trained: Callable[[str], DiffusionPolicy], tmp_path: Path
) -> None:
    state = trained("sd1").adapter_state()
    older = {name: array + np.float32(1) for name, array in state.items()}
    checkpoints = tmp_path / "runs" / "mine" / "checkpoints"
    save_checkpoint(checkpoints, Checkpoint(3, "f", older, {}, {}))
    save_checkpoint(checkpoints, Checkpoint(4, "f", state, {}, {}))
    assert invoke("mine", tmp_path / "out", "--storage", tmp_path / "runs", "--to", "kohya").exit_code == 0
    expected = {"run": "mine", "step": "4", "checksum": checksum(state)}
    assert adapter_metadata(tmp_path / "out" / "mine.safetensors") == expected
    assert invoke(checkpoints / "step-000003", tmp_path / "old.safetensors", "--to", "kohya").exit_code == 0
    assert adapter_metadata(tmp_path / "old.safetensors") == {"run": "mine", "step": "3", "checksum": checksum(older)}


def test_the_moving_average_is_what_is_exported(trained: Callable[[str], DiffusionPolicy], tmp_path: Path) -> None:
    state = trained("sd1").adapter_state()
    average = {name: array if name.endswith("alpha") else array / 2 for name, array in state.items()}
    save_checkpoint(tmp_path / "run" / "checkpoints", Checkpoint(1, "f", state, {}, {}, ema=average))
    assert invoke(tmp_path / "run", tmp_path / "out").exit_code == 0
    assert checksum(load_adapter_file(tmp_path / "out")) == checksum(average)


def test_a_merged_pipeline_keeps_every_part_of_the_users_own(
    trained: Callable[[str], DiffusionPolicy], tmp_path: Path
) -> None:
    from diffusers import EulerAncestralDiscreteScheduler
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    pipe = plain(tiny_pipeline())
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = CLIPConfig(
        vision_config={**small, "image_size": 32, "patch_size": 16}, text_config=small, projection_dim=8
    )
    torch.manual_seed(0)
    pipe.safety_checker = checker = StableDiffusionSafetyChecker(config)
    pipe.feature_extractor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.register_modules(safety_checker=checker, feature_extractor=pipe.feature_extractor, scheduler=pipe.scheduler)
    pipe.save_pretrained(tmp_path / "base")
    save_adapter(trained("sd1").adapter_state(), tmp_path / "lora")
    result = invoke(tmp_path / "lora", tmp_path / "merged", "--to", "merged", "--model", tmp_path / "base")
    assert result.exit_code == 0, result.output
    merged, base = plain(tmp_path / "merged"), plain(tmp_path / "base")
    assert type(merged.scheduler) is EulerAncestralDiscreteScheduler
    assert merged.feature_extractor.to_dict() == base.feature_extractor.to_dict()
    for part in ("safety_checker", "vae", "text_encoder"):
        ours, theirs = getattr(merged, part).state_dict(), getattr(base, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), part
    changed = {k for k, v in merged.unet.state_dict().items() if not torch.equal(v, base.unet.state_dict()[k])}
    assert changed == {f"{module}.weight" for module in lora_modules(trained("sd1"))}


def lora_modules(policy: DiffusionPolicy) -> set[str]:
    names = [name for name in policy.adapter_state() if name.endswith(".lora_A.weight")]
    return {name.removeprefix("unet.").removesuffix(".lora_A.weight") for name in names}


def test_a_merged_pipeline_in_half_precision_says_how_to_load_it(
    trained: Callable[[str], DiffusionPolicy], tiny_recipe: RecipeFactory, tmp_path: Path
) -> None:
    changes = {"model.dtype": "bfloat16", "model.component_dtypes": {"vae": "float32"}}
    run = make_run(tmp_path, tiny_recipe(changes), trained("sd1"))
    result = invoke(run, tmp_path / "merged", "--to", "merged")
    assert result.exit_code == 0, result.output
    assert 'torch_dtype={"default": torch.bfloat16, "vae": torch.float32})' in result.stdout
    pipe = plain(tmp_path / "merged", torch_dtype={"default": torch.bfloat16, "vae": torch.float32})
    base = plain(tiny_pipeline(), torch_dtype=torch.bfloat16)
    assert (pipe.unet.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    assert (pipe.unet.conv_in.weight == base.unet.conv_in.weight).all()


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_form_that_a_family_does_not_have_is_refused(
    name: str, trained: Callable[[str], DiffusionPolicy], tmp_path: Path
) -> None:
    save_adapter(trained(name).adapter_state(), tmp_path / "lora")
    line = refused(tmp_path / "lora", tmp_path / "out", "--to", "kohya")
    assert "no kohya form of a transformer adapter" in line
    assert "--to diffusers" in line
    assert not (tmp_path / "out").exists()


def test_an_unknown_form_names_the_known_ones(tmp_path: Path) -> None:
    assert "diffusers, kohya, merged" in refused(tmp_path, tmp_path / "out", "--to", "onnx")


def test_a_base_model_is_asked_for_when_none_is_known(
    trained: Callable[[str], DiffusionPolicy], tmp_path: Path
) -> None:
    save_adapter(trained("sd1").adapter_state(), tmp_path / "lora")
    assert "--model PATH" in refused(tmp_path / "lora", tmp_path / "out", "--to", "merged")
    assert "needs no base model" in refused(tmp_path / "lora", tmp_path / "out", "--model", tiny_pipeline())


def test_a_model_that_is_gone_or_is_none_is_named(
    trained: Callable[[str], DiffusionPolicy], tiny_recipe: RecipeFactory, tmp_path: Path
) -> None:
    run = make_run(tmp_path, tiny_recipe({"model.path": str(tmp_path / "gone")}), trained("sd1"))
    line = refused(run, tmp_path / "out", "--to", "merged")
    assert str(tmp_path / "gone") in line
    assert "--model PATH" in line
    assert "no such folder" in refused(run, tmp_path / "out", "--to", "merged", "--model", tmp_path / "nowhere")
    assert "model_index.json" in refused(run, tmp_path / "out", "--to", "merged", "--model", tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_damaged_recipe_of_a_run_is_named(
    trained: Callable[[str], DiffusionPolicy], tiny_recipe: RecipeFactory, tmp_path: Path
) -> None:
    run = make_run(tmp_path, tiny_recipe({"model.colour": "blue"}), trained("sd1"))
    line = refused(run, tmp_path / "out", "--to", "merged")
    assert str(run / "recipe.yaml") in line
    assert "model.colour" in line
    assert invoke(run, tmp_path / "out").exit_code == 0  # a LoRA needs no recipe


def test_the_first_module_that_does_not_fit_is_named(trained: Callable[[str], DiffusionPolicy], tmp_path: Path) -> None:
    save_adapter(trained("sd1").adapter_state(), tmp_path / "sd1")
    save_adapter(trained("sd3").adapter_state(), tmp_path / "sd3")
    line = refused(tmp_path / "sd1", tmp_path / "out", "--to", "merged", "--model", tiny_sdxl())
    first = sorted(lora_modules(trained("sd1")))[0]
    assert f"adapts {first}" in line
    line = refused(tmp_path / "sd3", tmp_path / "out", "--to", "merged", "--model", tiny_sdxl())
    assert "StableDiffusionXLPipeline without the transformer" in line
    assert not (tmp_path / "out").exists()


def test_the_base_model_is_never_overwritten(trained: Callable[[str], DiffusionPolicy], tmp_path: Path) -> None:
    base = tmp_path / "models" / "base"
    plain(tiny_pipeline()).save_pretrained(base)
    before = {path: path.stat().st_mtime_ns for path in base.rglob("*")}
    save_adapter(trained("sd1").adapter_state(), tmp_path / "lora")
    for target in (base, base / "merged", base.parent):
        line = refused(tmp_path / "lora", target, "--to", "merged", "--model", base, "--force")
        assert "is where the base model is" in line
    assert {path: path.stat().st_mtime_ns for path in base.rglob("*")} == before


@pytest.mark.parametrize("form", ["diffusers", "kohya", "merged"])
def test_nothing_is_overwritten_unasked_and_strangers_never(
    form: str, trained: Callable[[str], DiffusionPolicy], tiny_recipe: RecipeFactory, tmp_path: Path
) -> None:
    run = make_run(tmp_path, tiny_recipe(), trained("sd1"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("x", encoding="utf-8")
    assert "--force" in refused(run, out, "--to", form)
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    for _ in range(2):
        result = invoke(run, out, "--to", form, "--force")
        assert result.exit_code == 0, result.output
    assert (out / "precious.txt").read_text(encoding="utf-8") == "x"
    assert not [path for path in (*out.iterdir(), *tmp_path.iterdir()) if path.name.startswith(".")]  # no leftovers


@pytest.mark.parametrize("form", ["diffusers", "kohya", "merged"])
def test_a_target_that_cannot_be_written_is_named(
    form: str, trained: Callable[[str], DiffusionPolicy], tiny_recipe: RecipeFactory, tmp_path: Path
) -> None:
    run = make_run(tmp_path, tiny_recipe(), trained("sd1"))
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert "is a file" in refused(run, tmp_path / "file", "--to", form)
    assert "cannot be written" in refused(run, tmp_path / "file" / "below" / "out", "--to", form)


def test_only_kohya_takes_the_name_of_a_file(
    trained: Callable[[str], DiffusionPolicy], tiny_recipe: RecipeFactory, tmp_path: Path
) -> None:
    run = make_run(tmp_path, tiny_recipe(), trained("sd1"))
    file = tmp_path / "loras" / "safe.safetensors"
    for form in ("diffusers", "merged"):
        assert "choose a folder" in refused(run, file, "--to", form)
    assert invoke(run, file, "--to", "kohya").exit_code == 0
    assert "--force" in refused(run, file, "--to", "kohya")
    assert checksum(load_adapter_file(file)) == checksum(trained("sd1").adapter_state())
