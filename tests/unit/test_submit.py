"""Submitting a recipe: what travels, what is refused before anything is sent, and an address that is no cluster's."""

from __future__ import annotations

import json
import shlex
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from cluster import packing
from cluster.auth import guard_private_cluster, own_token
from cluster.cli import app
from cluster.config import load_recipe
from cluster.jobs import shared_folder
from cluster.packing import check_needed, check_size, travelling
from cluster.runtime import runtime_env
from cluster.submit import check_what_is_here, needed_files
from raysteer.errors import ClusterError, ConfigError, DatasetError, ModelError, UserError
from tests.conftest import RecipeFactory
from tests.unit.test_dataset import IDENTITY, row, write


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    for name in ("code.py", "data/kept.txt", "data/left.txt", "secret/all.txt", ".venv/lib.py", ".git/config"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / ".gitignore").write_text("secret/\n")
    (folder / "data" / ".rayignore").write_text("left.txt\n")
    return folder


def test_what_travels_is_exactly_what_ray_packs(project: Path, tmp_path: Path) -> None:
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(project), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    packed = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    assert {str(path.relative_to(project)) for path in travelling(project)} == packed
    assert "code.py" in packed and not packed & {"data/left.txt", "secret/all.txt", ".venv/lib.py", ".git/config"}


def needed(project: Path, name: str, absolute: bool = False, here: bool = False) -> list[str]:
    path = project / name
    return check_needed(project, travelling(project), {"prompts.safe": path}, {path} if absolute else (), here)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("secret", ".gitignore or .rayignore names it"),
        ("data/left.txt", ".gitignore or .rayignore names it"),
        ("../outside.txt", "outside the working directory"),
        ("data/missing.txt", "there is no such file"),
    ],
)
def test_a_relative_path_that_cannot_be_there_in_the_job_is_refused(project: Path, name: str, reason: str) -> None:
    (project.parent / "outside.txt").touch()
    with pytest.raises(ConfigError, match=reason) as caught:
        needed(project, name)
    assert caught.value.key == "prompts.safe"


def test_a_folder_that_travels_in_part_is_a_warning_that_names_the_rest(project: Path) -> None:
    assert needed(project, "code.py") == []
    assert needed(project, "data") == ["prompts.safe: ignored files do not travel: data/left.txt"]


def test_an_absolute_path_means_the_clusters_own_file(project: Path) -> None:
    assert needed(project, "data/missing.txt", absolute=True) == []
    assert "must have it at the same place" in needed(project, "code.py", absolute=True)[0]
    assert needed(project, "code.py", absolute=True, here=True) == []


def test_large_files_are_named_and_too_much_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = travelling(project)
    assert check_size(project, files) == []
    monkeypatch.setattr(packing, "LARGE_FILE_BYTES", len("data/kept.txt"))
    (warning,) = check_size(project, files)
    assert "data/kept.txt" in warning and "code.py" not in warning
    monkeypatch.setattr(packing, "LARGEST_PACKAGE_BYTES", 10)
    with pytest.raises(UserError, match=r"the largest are data/kept\.txt.*\.rayignore"):
        check_size(project, files)


def test_files_that_only_the_cluster_has_do_not_keep_the_rest_from_being_checked(tiny_recipe: RecipeFactory) -> None:
    recipe = load_recipe(tiny_recipe({"prompts.safe": "/mnt/cluster/only.txt"}))
    check_what_is_here(recipe)
    assert needed_files(recipe)["prompts.safe"] == Path("/mnt/cluster/only.txt")
    (Path(recipe.model.path).parent / "no-pipeline").mkdir(exist_ok=True)
    with pytest.raises(ModelError, match="not a diffusers pipeline"):
        check_what_is_here(
            load_recipe(tiny_recipe({"model.path": str(Path(recipe.model.path).parent / "no-pipeline")}))
        )


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("secret/set", "offline.data.*it would not travel, because .gitignore or .rayignore names it.*absolute path"),
        ("missing", "offline.data.*there is no such file in the working directory.*absolute path"),
    ],
)
def test_a_dataset_that_would_not_be_there_in_the_job_is_refused_by_its_key(
    tiny_recipe: RecipeFactory, project: Path, monkeypatch: pytest.MonkeyPatch, place: str, reason: str
) -> None:
    from cluster.identity import model_identity

    monkeypatch.chdir(project)
    changes = {"objective": {"name": "gdro"}, "sampling.group_size": 4, "run.groups_per_step": 1}
    changes |= {"prompts.unsafe_fraction": 0.0, "offline": {"data": place}}
    recipe = load_recipe(tiny_recipe(changes))
    write(project / "secret" / "set", row(0), identity=IDENTITY | model_identity(recipe))
    found = {"offline.data": needed_files(recipe)["offline.data"]}
    with pytest.raises(ConfigError, match=reason):
        check_needed(project, travelling(project), found, (), here=True)
    assert check_needed(project, travelling(project), found, found.values(), here=True) == []


def test_a_dataset_that_is_here_is_checked_before_anything_is_sent(tiny_recipe: RecipeFactory, tmp_path: Path) -> None:
    file = write(tmp_path / "set", row(0))
    changes = {"objective": {"name": "gdro"}, "offline": {"data": str(tmp_path / "set")}}
    with pytest.raises(DatasetError, match="was made with another denoiser"):
        check_what_is_here(load_recipe(tiny_recipe(changes)))
    file.write_bytes(b"")
    assert "part-000001.parquet: cannot be read" in submit(tiny_recipe(changes), "http://127.0.0.1:1")


def test_storage_is_absolute_or_the_cluster_is_this_machine(tmp_path: Path) -> None:
    here, elsewhere = SimpleNamespace(here=True), SimpleNamespace(here=False)
    assert shared_folder(elsewhere, "/mnt/shared", "run.storage", tmp_path) == "/mnt/shared"  # type: ignore[arg-type]
    assert shared_folder(here, "runs", "run.storage", tmp_path) == str(tmp_path / "runs")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^run\.storage runs: .*/mnt/shared/runs"):
        shared_folder(elsewhere, "runs", "run.storage", tmp_path)  # type: ignore[arg-type]


@pytest.fixture
def not_ray() -> Iterator[str]:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>welcome</html>")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def submit(recipe: Path, address: str, *options: str) -> str:
    arguments = ["submit", str(recipe), "--address", address, "--working-dir", str(recipe.parent), *options]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1 and not result.stdout
    return result.stderr


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "http://", "http://host:port"])
def test_what_is_no_url_of_a_dashboard_is_refused(tiny_recipe: RecipeFactory, address: str) -> None:
    assert "not the URL of a dashboard" in submit(tiny_recipe(), address)


def test_a_wrong_address_is_one_line(tiny_recipe: RecipeFactory, not_ray: str) -> None:
    assert "this is not a Ray dashboard" in submit(tiny_recipe(), not_ray)
    assert "nobody answers there" in submit(tiny_recipe(), "http://127.0.0.1:1")


def test_a_wrong_recipe_is_refused_before_the_cluster_is_asked(tiny_recipe: RecipeFactory, tmp_path: Path) -> None:
    nobody = "http://127.0.0.1:1"
    assert "sampling.steps" in submit(tiny_recipe({"sampling.steps": "many"}), nobody)
    outside = tiny_recipe()
    (tmp_path / "elsewhere").mkdir()
    assert "outside the working directory" in submit(outside, nobody, "--working-dir", str(tmp_path / "elsewhere"))


def test_what_a_job_has_set_is_not_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = runtime_env()
    set_by_job = {"OMP_NUM_THREADS": "4", "HF_HUB_OFFLINE": "0"}
    theirs = {"working_dir": "gcs://p.zip", "env_vars": set_by_job}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": theirs, "metadata": {}}))
    inside = runtime_env()
    assert "PYTHONPATH" in alone["env_vars"] and "PYTHONPATH" not in inside["env_vars"]
    assert not inside["env_vars"].keys() & set_by_job.keys()
    assert inside["worker_process_setup_hook"] == alone["worker_process_setup_hook"]


def test_a_private_cluster_gets_a_fresh_token_unless_the_user_has_decided(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that what is set below is removed again
        monkeypatch.delenv(name)
    assert guard_private_cluster()
    fresh = own_token()
    assert fresh is not None and len(fresh) == 64
    assert not guard_private_cluster() and own_token() == fresh, "the next cluster of the process has the same"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / "mine").write_text("my token\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "mine"))
    assert not guard_private_cluster() and own_token() == "my token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert not guard_private_cluster() and own_token() is None


def test_hostile_words_reach_the_shell_of_a_job_as_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from cluster.jobs import JobServer

    sent: dict[str, object] = {}
    server = object.__new__(JobServer)
    server.client = SimpleNamespace(submit_job=lambda **given: sent.update(given) or "id")
    command = ["python", "-m", "cluster", "train", "a b.yaml", "run.name=$(touch /tmp/x); rm -rf ~ 'q'"]
    server.submit(command, tmp_path, "name")
    assert shlex.split(str(sent["entrypoint"])) == command


def test_a_head_that_is_still_starting_is_asked_again_and_other_refusals_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import cluster.jobs as jobs

    answers = [*["Request failed with status code 500: No available agent to submit job"] * 2, "", "disk full"]

    class Client:
        def submit_job(self, submission_id: str, **_: object) -> str:
            if answer := answers.pop(0):
                raise RuntimeError(answer)
            return submission_id

    monkeypatch.setattr(jobs, "_AGAIN_S", 0.0)
    server = object.__new__(jobs.JobServer)
    server.url, server.client = "http://127.0.0.1:8265", Client()
    assert server.submit(["true"], None, "run").startswith("run-")
    with pytest.raises(ClusterError, match=r"not accepted \(disk full\)"):
        server.submit(["true"], None, "run")
