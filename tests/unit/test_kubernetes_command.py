"""raysteer render-k8s: what it writes, where, and what it says."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli import app
from tests.conftest import RecipeFactory


def kinds(text: str) -> list[str]:
    return [one["kind"] for one in yaml.safe_load_all(text)]


def test_standard_output_is_one_stream_for_kubectl_and_nothing_else(tiny_recipe: RecipeFactory) -> None:
    result = CliRunner().invoke(app, ["render-k8s", str(tiny_recipe())])
    assert result.exit_code == 0, result.output
    assert {"Namespace", "NetworkPolicy", "Deployment", "ConfigMap", "RayJob"} <= set(kinds(result.stdout))
    assert "safe.txt to /mnt/raysteer/inputs/" in result.stderr


def test_a_folder_gets_what_is_shared_and_what_is_the_runs_own(tiny_recipe: RecipeFactory, tmp_path: Path) -> None:
    for name in ("one", "two"):
        command = ["render-k8s", str(tiny_recipe()), f"run.name={name}", "--out", str(tmp_path / "k8s")]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    assert sorted(file.name for file in (tmp_path / "k8s").iterdir()) == ["one.yaml", "shared.yaml", "two.yaml"]
    assert "RayJob" not in kinds((tmp_path / "k8s" / "shared.yaml").read_text(encoding="utf-8"))
    assert kinds((tmp_path / "k8s" / "two.yaml").read_text(encoding="utf-8"))[-2:] == ["ConfigMap", "RayJob"]


def test_a_file_gets_everything(tiny_recipe: RecipeFactory, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["render-k8s", str(tiny_recipe()), "--out", str(tmp_path / "all.yaml")])
    assert result.exit_code == 0, result.output
    assert set(kinds((tmp_path / "all.yaml").read_text(encoding="utf-8"))) >= {"Namespace", "RayJob"}


@pytest.mark.parametrize("place", ["taken.txt/k8s", "taken.txt"])
def test_a_place_that_cannot_be_written_is_one_line(tiny_recipe: RecipeFactory, tmp_path: Path, place: str) -> None:
    (tmp_path / "taken.txt").write_text("x", encoding="utf-8")
    result = CliRunner().invoke(app, ["render-k8s", str(tiny_recipe()), "--out", str(tmp_path / place)])
    assert result.exit_code == 2
    assert result.stderr.startswith("raysteer: --out") and result.stderr.count("\n") == 1
    assert (tmp_path / "taken.txt").read_text(encoding="utf-8") == "x"
