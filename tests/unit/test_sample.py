"""The safety dial: exact at both ends, continuous in between, and one picture that shows nothing but the model."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from cluster.cli import app
from cluster.sample import Look, draw
from diffusion.adapters import checksum, save_adapter
from diffusion.policy import DiffusionPolicy, LoRAConfig, ModelConfig
from diffusion.sampling import generate
from evaluation.strip import heading, scale_strip
from tests.conftest import RecipeFactory
from tests.policies import moved
from tests.tiny import tiny_pipeline
from tests.tiny_flow import RESOLUTION, tiny_flux, tiny_sd3
from tests.tiny_unet import tiny_sdxl

MODELS = {"sd1": tiny_pipeline, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux}
PROMPTS = ("a toxic sign", "a red circle")
LOOK = Look(prompts=PROMPTS, scales=(0.0, 0.5, 1.0), seed=4, steps=3, guidance=3.0)


def load(name: str = "sd1", **lora: object) -> DiffusionPolicy:
    """A policy of the tiny pipeline; alpha is not the rank."""
    config = ModelConfig(
        path=str(MODELS[name]()),
        lora=LoRAConfig.model_validate({"rank": 4, "alpha": 6.0, **lora}),
        resolution=RESOLUTION,
    )
    return DiffusionPolicy.load(config)


@pytest.fixture(scope="module")
def trained() -> DiffusionPolicy:
    return moved(load(), 0.2)


@torch.no_grad()
def output(policy: DiffusionPolicy) -> torch.Tensor:
    x = torch.randn((2, *policy.latent_shape), generator=torch.Generator().manual_seed(3))
    return policy.family.denoise(x, 501.0, policy.encode(PROMPTS), 3.0)


def at_scale(policy: DiffusionPolicy, scale: float) -> torch.Tensor:
    policy.set_adapter_scale(scale)
    try:
        return output(policy)
    finally:
        policy.set_adapter_scale(1.0)


# ---- the scale ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_scale_0_is_the_base_model_and_scale_1_the_adapter_to_the_bit(name: str) -> None:
    policy = load(name)
    base = output(policy)
    moved(policy, 0.2)
    full = output(policy)
    assert (full - base).abs().max() > 0.01
    for scale in (0.0, 0.3, 1.0, 0.0, 2.0, 1.0):  # and the way there does not matter
        policy.set_adapter_scale(scale)
        if scale in (0.0, 1.0):
            assert torch.equal(output(policy), base if scale == 0 else full)
        with policy.adapter_disabled():
            assert torch.equal(output(policy), base)


def test_the_part_of_the_adapter_is_linear_in_the_scale() -> None:
    """Seen where nothing comes after it: an adapter of the last layer alone."""
    policy = moved(load(targets=("conv_out",)), 0.2)
    base, full = at_scale(policy, 0.0), at_scale(policy, 1.0)
    assert (full - base).abs().max() > 0.1
    for scale in (0.125, 0.25, 0.5, 0.75, 1.5, 2.0):
        assert (at_scale(policy, scale) - (base + scale * (full - base))).abs().max() < 1e-5


def test_the_dial_moves_the_model_steadily_away_from_its_base(trained: DiffusionPolicy) -> None:
    base = at_scale(trained, 0.0)
    distances = [float((at_scale(trained, scale) - base).norm()) for scale in (0.0, 0.001, 0.25, 0.5, 0.75, 1.0, 1.5)]
    assert distances == sorted(set(distances))
    assert distances[1] < distances[5] / 500  # no jump where the adapter is switched on


def test_a_scale_is_no_part_of_the_adapter(trained: DiffusionPolicy) -> None:
    before = checksum(trained.adapter_state())
    trained.set_adapter_scale(0.5)
    assert checksum(trained.adapter_state()) == before
    trained.load_adapter(trained.adapter_state())
    trained.set_adapter_scale(1.0)


def test_images_depend_on_nothing_but_prompt_seed_and_scale(trained: DiffusionPolicy) -> None:
    drawn = draw(trained, LOOK)
    assert drawn.shape == (2, 3, 32, 32, 3)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(trained, [prompt], [4], steps=3, guidance_scale=3.0)[0]
        assert np.array_equal(drawn[row, 2], alone)  # neither the other prompts nor the scales before it
        with trained.adapter_disabled():
            base = generate(trained, [prompt], [4], steps=3, guidance_scale=3.0)[0]
        assert np.array_equal(drawn[row, 0], base)
        far, near = (np.abs(drawn[row, k].astype(float) - base).mean() for k in (2, 1))
        assert 0 < near < far


def test_neither_sample_nor_export_needs_ray() -> None:
    code = "import sys, cluster.config, cluster.export, cluster.sample; print({'ray', 'mlflow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "set()"


# ---- the command ----------------------------------------------------------------------------------------------------


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["sample", *map(str, arguments)])


def refused(*arguments: object) -> str:
    """The one line with which a command refuses."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""  # before a model is loaded
    return result.stderr


@pytest.fixture
def run(tmp_path: Path, trained: DiffusionPolicy, tiny_recipe: RecipeFactory) -> Path:
    """A finished run, as far as a sample reads it."""
    folder = tmp_path / "runs" / "tiny"
    save_adapter(trained.adapter_state(), folder / "adapter", {"run": "tiny", "step": "9"})
    (folder / "recipe.yaml").write_bytes(tiny_recipe().read_bytes())
    return folder


def test_the_picture_holds_the_very_images_and_says_how_they_were_made(
    run: Path, trained: DiffusionPolicy, tmp_path: Path
) -> None:
    out = tmp_path / "dial.png"
    prompts = [argument for prompt in PROMPTS for argument in ("--prompt", prompt)]
    result = invoke(run, *prompts, "--scale", "0", "--scale", "0.5,1", "--seed", 4, "--out", out)
    assert result.exit_code == 0, result.output
    assert str(out) in result.stdout
    picture = Image.open(out)
    facts = json.loads(picture.text["raysteer"])  # type: ignore[attr-defined]
    assert facts["checksum"] == checksum(trained.adapter_state())
    assert {key: facts[key] for key in ("run", "step", "seed", "scales", "steps", "guidance_scale")} == {
        "run": "tiny",
        "step": "9",
        "seed": 4,
        "scales": [0.0, 0.5, 1.0],
        "steps": 4,  # the recipe has no evaluation: those of its sampling
        "guidance_scale": 2.0,
    }
    pixels = np.asarray(picture.convert("RGB"))
    drawn = draw(trained, Look(PROMPTS, (0.0, 0.5, 1.0), seed=4, steps=4, guidance=2.0))
    for image in drawn.reshape(-1, 32, 32, 3):
        assert contains(pixels, image)


def contains(picture: np.ndarray, image: np.ndarray, factor: int = 6) -> bool:
    """Whether every pixel of ``image`` is there as a square, at one place."""
    sought = image.repeat(factor, 0).repeat(factor, 1)
    height, width = sought.shape[:2]
    rows, columns = picture.shape[0] - height + 1, picture.shape[1] - width + 1
    corner = (picture[:rows, :columns] == sought[0, 0]).all(-1)
    return any(np.array_equal(picture[y : y + height, x : x + width], sought) for y, x in np.argwhere(corner))


def test_before_and_after_is_what_is_drawn_unless_said_otherwise(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "dial.png"
    assert invoke("tiny", "--storage", run.parent, "--prompt", "a red circle", "--out", out).exit_code == 0
    assert json.loads(Image.open(out).text["raysteer"])["scales"] == [0.0, 1.0]  # type: ignore[attr-defined]
    before = out.read_bytes()
    assert invoke(run, "--prompt", "a red circle", "--out", out).exit_code == 0
    assert out.read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_adapter_alone_needs_a_model_and_gets_its_own_rank_alpha_and_targets(
    tmp_path: Path, tiny_recipe: RecipeFactory
) -> None:
    policy = moved(load(rank=3, alpha=5.0, targets=("conv_out", "attn2.to_k")), 0.2)
    save_adapter(policy.adapter_state(), tmp_path / "lora")
    out = tmp_path / "dial.png"
    arguments = (tmp_path / "lora", "--prompt", "a red circle", "--out", out)
    assert "--model PATH" in refused(*arguments)
    result = invoke(*arguments, "--model", tiny_pipeline(), "--steps", 3, "--guidance", 3)
    assert result.exit_code == 0, result.output
    drawn = draw(policy, Look(("a red circle",), (0.0, 1.0), steps=3, guidance=3.0))
    pixels = np.asarray(Image.open(out).convert("RGB"))
    assert contains(pixels, drawn[0, 0])
    assert contains(pixels, drawn[0, 1])


def test_beyond_training_is_noted(run: Path, tmp_path: Path) -> None:
    result = invoke(run, "--prompt", "a red circle", "--scale", "1.5", "--steps", 1, "--out", tmp_path / "dial.png")
    assert result.exit_code == 0, result.output
    assert "stronger than it was ever trained" in result.stdout
    assert [heading(scale) for scale in (0, 0.25, 1, 1.5)] == [
        "0  base model",
        "0.25",
        "1  adapter",
        "1.5  beyond training",
    ]


def test_a_prompt_that_is_cut_off_is_noted(run: Path, tmp_path: Path) -> None:
    result = invoke(run, "--prompt", "red " * 40, "--scale", "0", "--steps", 1, "--out", tmp_path / "dial.png")
    assert "only the beginning of this prompt: red red" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt: is missing"),
        (["--prompt", "a", "--prompt", "  "], "--prompt (number 2): is empty"),
        (["--prompt", "a", "--scale", "-0.5"], "--scale -0.5: is negative"),
        (["--prompt", "a", "--scale", "half"], "--scale half: is not a number"),
        (["--prompt", "a", "--scale", "nan"], "--scale nan: is not a number"),
        (["--prompt", "a", "--scale", "0,,1"], "is not a number"),
        (["--prompt", "a", "--scale", "2.5"], "--scale 2.5: is more than 2"),
        (["--prompt", "a", "--steps", "0"], "--steps 0: is out of range"),
        (["--prompt", "a", "--steps", "ten"], "--steps ten: is not a whole number"),
        (["--prompt", "a", "--seed", "-1"], "--seed -1: is out of range"),
        (["--prompt", "a", "--guidance", "inf"], "--guidance inf: is not a number"),
        (["--prompt", "a", "--out", "picture.jpg"], "is not the name of a PNG"),
        (["--prompt", "a", "--out", "nowhere/a.png"], "there is no folder nowhere"),
        (["--prompt", "a", "--out", "/proc/a.png"], "cannot be written to"),
        (["--prompt", "a", "--model", "/nowhere"], "/nowhere: no such folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_drawn_is_said_in_one_line(run: Path, arguments: list[str], message: str) -> None:
    assert message in refused(run, *arguments)


def test_a_run_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "no such run" in refused(tmp_path / "gone", "--prompt", "a")


def test_an_adapter_of_another_model_names_the_module(tmp_path: Path, trained: DiffusionPolicy) -> None:
    save_adapter(trained.adapter_state(), tmp_path / "lora")
    line = refused(tmp_path / "lora", "--prompt", "a", "--model", tiny_sdxl(), "--out", tmp_path / "a.png")
    assert "adapts down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k" in line
    assert "UNet2DConditionModel" in line


# ---- the layout -----------------------------------------------------------------------------------------------------


def test_any_prompt_fits_and_large_images_keep_their_pixels(tmp_path: Path) -> None:
    prompts = ["word " * 300, "w" * 500, "красный круг\n\tété"]
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 300, 400, 3), dtype=np.uint8)
    path = scale_strip(tmp_path / "a.png", images, prompts, [0.5], "title " * 200, {})
    pixels = np.asarray(Image.open(path).convert("RGB"))
    for image in images[:, 0]:
        assert contains(pixels, image, factor=1)
    assert pixels.shape[1] < 700
    white = (pixels == 255).all(-1)
    assert white[:, -8:].all()  # no text runs off the edge
