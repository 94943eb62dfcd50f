"""Bad input, through the real command line: one line that says what to do, exit code 2, quickly, nothing touched."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.config import load_recipe
from raysteer.errors import ClusterError, ConfigError, ModelError
from tests.conftest import RecipeFactory

Refused = Callable[..., str]


def tree(folder: Path) -> dict[str, tuple[int, float]]:
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime) for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture
def refused(tiny_recipe: RecipeFactory, tmp_path: Path) -> Refused:
    """Run ``raysteer train`` on a changed tiny recipe and return its one line of complaint."""

    def run(changes: dict[str, Any] | None = None, *overrides: str, command: str = "train") -> str:
        recipe = tiny_recipe(changes)
        before, children, started = tree(tmp_path), set(psutil.Process().children(recursive=True)), time.monotonic()
        result = CliRunner().invoke(app, [command, str(recipe), *overrides])
        assert result.exit_code == 2, result.output
        assert time.monotonic() - started < 20
        assert tree(tmp_path) == before
        assert set(psutil.Process().children(recursive=True)) <= children
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        assert len(lines) == 1, result.stderr
        assert result.stdout == ""
        return lines[0]

    return run


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_missing_recipe() -> None:
    result = CliRunner().invoke(app, ["train", "no/such/recipe.yaml"])
    assert result.exit_code == 2
    assert "no/such/recipe.yaml" in result.stderr
    assert "no such file" in result.stderr


def test_an_unknown_key(refused: Refused) -> None:
    assert "did you mean run.steps?" in refused(None, "run.stepps=3")


def test_a_missing_model_folder(refused: Refused, tmp_path: Path) -> None:
    line = refused({"model.path": str(tmp_path / "nowhere")})
    assert "model.path" in line
    assert "nowhere" in line
    assert "no such folder" in line


def test_a_folder_that_is_no_pipeline(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    line = refused({"model.path": str(tmp_path / "empty")})
    assert "model_index.json" in line
    assert "save_pretrained" in line


def test_a_pipeline_class_without_a_family(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "model_index.json").write_text(json.dumps({"_class_name": "OddPipeline"}), encoding="utf-8")
    line = refused({"model.path": str(tmp_path / "odd")})
    assert "OddPipeline" in line
    assert "StableDiffusionPipeline" in line


def test_torn_weights(refused: Refused, tmp_path: Path, tiny_pipeline: Path) -> None:
    folder = tmp_path / "torn"
    shutil.copytree(tiny_pipeline, folder)
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    assert weights.name in refused({"model.path": str(folder)})


def test_lora_targets_that_match_nothing(refused: Refused) -> None:
    assert "model.lora.targets" in refused({"model.lora.targets": ["no_such_module"]})


@pytest.mark.parametrize("content", [None, b"", b"\n  \n", b"caf\xe9\n"], ids=["missing", "empty", "blank", "latin-1"])
def test_a_prompt_file_that_cannot_be_used(refused: Refused, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "prompts-under-test.txt"
    if content is not None:
        file.write_bytes(content)
    assert "prompts-under-test.txt" in refused({"prompts.unsafe": str(file)})


@pytest.mark.parametrize("text", ["safe: [a]\nunsafe: []\n", "safe: [a\n", ""], ids=["empty", "no YAML", "no text"])
def test_anchors_without_a_direction(refused: Refused, tmp_path: Path, text: str) -> None:
    file = tmp_path / "anchors.yaml"
    file.write_text(text, encoding="utf-8")
    assert "reward.anchors" in refused({"reward.anchors": str(file)})


def test_an_anchor_set_that_does_not_exist(refused: Refused) -> None:
    assert "compact" in refused(None, "reward.anchors=tiny")


def test_a_detector_that_cannot_be_imported(refused: Refused) -> None:
    assert "no_such_module" in refused(None, "reward.detector=no_such_module:f")


def test_a_clip_folder_that_is_none(refused: Refused, tmp_path: Path) -> None:
    assert "reward.clip.model" in refused({"reward.clip.model": f"local-dir:{tmp_path / 'nowhere'}"})
    (tmp_path / "empty").mkdir()
    assert "open_clip_config.json" in refused({"reward.clip.model": f"local-dir:{tmp_path / 'empty'}"})


def test_trained_steps_without_enough_noise(refused: Refused) -> None:
    assert "min_sigma" in refused(None, "sampling.trained.min_sigma=5.0")


def test_a_disk_without_room_for_the_run(refused: Refused) -> None:
    line = refused({"run.steps": 10**11, "run.checkpoint_every": 10**6})
    assert "run.storage" in line
    assert "are free" in line


def test_a_storage_that_is_a_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x", encoding="utf-8")
    assert "is a file" in refused({"run.storage": str(tmp_path / "taken")})


def test_a_run_name_in_use(refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    holder = {
        "pid": os.getppid(),
        "host": socket.gethostname(),
        "started": psutil.Process(os.getppid()).create_time(),
    }
    (folder / "run.lock").write_text(json.dumps(holder), encoding="utf-8")
    line = refused()
    assert f"process {os.getppid()}" in line
    assert "run.name" in line


def test_a_checkpoint_of_another_recipe(refused: Refused, tiny_recipe: RecipeFactory, tmp_path: Path) -> None:
    from cluster.config import load_recipe
    from learner.checkpoint import Checkpoint, save_checkpoint

    earlier = load_recipe(tiny_recipe(), ["optimizer.lr=0.5"])
    (earlier.run_dir).mkdir(parents=True)
    (earlier.run_dir / "recipe.yaml").write_text(earlier.to_yaml(), encoding="utf-8")
    state = {"a": np.zeros(1, np.float32)}
    save_checkpoint(earlier.run_dir / "checkpoints", Checkpoint(1, earlier.fingerprint(), state, state, {}))
    line = refused()
    assert "another recipe" in line
    assert "optimizer.lr was 0.5" in line


def test_an_mlflow_server_that_is_not_there(refused: Refused, free_port: int) -> None:
    line = refused({"tracking.uri": f"http://127.0.0.1:{free_port}"})
    assert f"127.0.0.1:{free_port}" in line
    assert "no MLflow server answers" in line


@pytest.fixture
def refusing_server() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(403)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_mlflow_server_that_refuses_the_host_name(refused: Refused, refusing_server: str) -> None:
    assert "--allowed-hosts" in refused({"tracking.uri": refusing_server})


def test_an_mlflow_server_that_never_answers() -> None:
    from cluster.tracking import probe
    from raysteer.errors import TrackingError

    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(TrackingError, match="no MLflow server answers"):
            probe(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2)
        assert time.monotonic() - started < 5


def test_a_tracking_folder(refused: Refused) -> None:
    assert "sqlite" in refused({"tracking.uri": "./mlruns"})


@pytest.mark.parametrize("address", ["localhost", "host:port", "ray://127.0.0.1:10001", "http://127.0.0.1:8265"])
def test_an_address_that_is_none(refused: Refused, address: str) -> None:
    line = refused({"cluster": {"address": address}})
    assert f"cluster.address {address}" in line


def test_a_cluster_address_nobody_listens_on(refused: Refused, free_port: int) -> None:
    assert "nobody answers" in refused({"cluster": {"address": f"127.0.0.1:{free_port}"}})


def test_no_cluster_on_this_machine(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert "ray start --head" in refused({"cluster": {"address": "auto"}})


def test_a_dashboard_port_in_use(refused: Refused) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused({"cluster": {"dashboard": True, "dashboard_port": port}})
    assert f"cluster.dashboard_port {port}" in line


def test_more_gpus_than_there_are(refused: Refused) -> None:
    line = refused({"samplers.num_gpus": 1.0, "samplers.count": 1000})
    assert "1000" in line
    assert "GPU" in line


def test_a_joined_cluster_that_is_too_small() -> None:
    from cluster.runtime import check_capacity

    with pytest.raises(ClusterError, match=r"2 CPUs.*needs 8"):
        check_capacity({"CPU": 2.0}, num_cpus=8, num_gpus=0, autoscaling=False)
    check_capacity({"CPU": 2.0}, num_cpus=8, num_gpus=0, autoscaling=True)
    check_capacity({"CPU": 8.0}, num_cpus=8, num_gpus=0, autoscaling=False)


def test_plan_complains_as_train_does(refused: Refused, tmp_path: Path) -> None:
    assert "no such folder" in refused({"model.path": str(tmp_path / "nowhere")}, command="plan")


def test_the_exit_code_reaches_the_shell(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cluster", "train", str(tmp_path / "missing.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("raysteer: ")
    assert len(done.stderr.splitlines()) == 1


def test_guidance_that_a_model_does_not_know_is_refused_before_anything_starts(tiny_recipe: RecipeFactory) -> None:
    from cluster.preflight import check_schedule
    from tests.tiny_flow import RESOLUTION, tiny_flux

    schnell = {"model.path": str(tiny_flux(guidance_embeds=False)), "model.resolution": RESOLUTION}
    with pytest.raises(ConfigError, match=r"sampling\.guidance_scale: 2\.0 .*schnell.*use 1"):
        check_schedule(load_recipe(tiny_recipe(schnell | {"sampling.guidance_scale": 2.0})))
    check_schedule(load_recipe(tiny_recipe(schnell | {"sampling.guidance_scale": 1.0})))


def test_a_missing_t5_is_named_before_anything_starts(tiny_recipe: RecipeFactory) -> None:
    from cluster.preflight import check_model
    from tests.tiny_flow import tiny_sd3

    with pytest.raises(ModelError, match=r"text_encoder_3.*model\.use_t5=false"):
        check_model(load_recipe(tiny_recipe({"model.path": str(tiny_sd3(with_t5=False))})))
    check_model(load_recipe(tiny_recipe({"model.path": str(tiny_sd3(with_t5=False)), "model.use_t5": False})))
    with pytest.raises(ConfigError, match=r"model\.use_t5: False .*StableDiffusionPipeline cannot"):
        check_model(load_recipe(tiny_recipe({"model.use_t5": False})))
