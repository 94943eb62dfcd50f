"""The command line: instant help, exit codes, export, progress."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from cluster.cli import app
from cluster.cli_shell import reported
from raysteer import __version__
from raysteer.errors import ClusterError, DeadlineExceeded, ParityError
from tests.conftest import RecipeFactory


def invoke(*arguments: str) -> typer.testing.Result:  # type: ignore[name-defined]
    return CliRunner().invoke(app, list(arguments))


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'ray', 'mlflow', 'diffusers', 'numpy', 'pydantic'}"
    code = f"import sys; import cluster.cli; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


def test_help_and_version() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    expected = {"plan", "train", "generate", "submit", "status", "stop", "eval", "compare", "data", "export", "sample"}
    for command in expected:
        assert command in result.stdout
    assert invoke("--version").stdout.strip() == __version__


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ClusterError("a", "b", "c"), 2),
        (DeadlineExceeded("a batch", 3.0, "look at the samplers"), 3),
        (ParityError("the ratio\nis not 1"), 3),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_become_one_line_and_an_exit_code(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    @reported
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as caught:
        command()
    assert caught.value.exit_code == code
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_our_own_bugs_keep_their_stack_trace() -> None:
    @reported
    def command() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command()


def test_plan_prints_the_arithmetic_and_starts_nothing(tiny_recipe: RecipeFactory, tmp_path: Path) -> None:
    result = invoke("plan", str(tiny_recipe()), "run.steps=3")
    assert result.exit_code == 0, result.output
    assert "2 prompts × 2 images each = 4 images" in result.stdout
    assert "3 steps × 1 = 3 optimiser updates" in result.stdout
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def adapter_state(tiny_pipeline: Path) -> dict[str, np.ndarray]:
    from diffusion.policy import DiffusionPolicy, LoRAConfig, ModelConfig

    policy = DiffusionPolicy.load(
        ModelConfig(path=str(tiny_pipeline), lora=LoRAConfig(rank=2, alpha=4.0)), adapter_seed=1
    )
    rng = np.random.default_rng(0)
    state = policy.adapter_state()
    return {
        name: array if name.endswith("lora_alpha") else rng.normal(size=array.shape).astype(np.float32)
        for name, array in state.items()
    }


def test_a_checkpoint_is_exported_as_a_lora_that_plain_diffusers_loads(
    tmp_path: Path, tiny_pipeline: Path, adapter_state: dict[str, np.ndarray]
) -> None:
    from diffusers import StableDiffusionPipeline

    from learner.checkpoint import Checkpoint, save_checkpoint

    save_checkpoint(tmp_path / "runs" / "r" / "checkpoints", Checkpoint(3, "f", adapter_state, {}, {}))
    for source in ("r", str(tmp_path / "runs" / "r"), str(tmp_path / "runs" / "r" / "checkpoints" / "step-000003")):
        target = tmp_path / "out" / Path(source).name
        result = invoke("export", source, str(target), "--storage", str(tmp_path / "runs"), "--force")
        assert result.exit_code == 0, result.output
        assert "step 3" in result.stdout
        assert f'pipe.load_lora_weights("{target}")' in result.stdout
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None, local_files_only=True)
    pipe.load_lora_weights(str(target))
    assert pipe.get_list_adapters()


def test_export_never_overwrites_unasked(tmp_path: Path, adapter_state: dict[str, np.ndarray]) -> None:
    from diffusion.adapters import save_adapter

    save_adapter(adapter_state, tmp_path / "run" / "adapter")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("x", encoding="utf-8")
    refused = invoke("export", str(tmp_path / "run"), str(tmp_path / "out"))
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious.txt"]
    assert invoke("export", str(tmp_path / "run"), str(tmp_path / "out"), "--force").exit_code == 0


@pytest.mark.parametrize("make", [False, True], ids=["missing", "empty"])
def test_export_of_nothing(tmp_path: Path, make: bool) -> None:
    if make:
        (tmp_path / "run").mkdir()
    result = invoke("export", str(tmp_path / "run"), str(tmp_path / "out"))
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()
