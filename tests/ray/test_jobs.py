"""Jobs on a running cluster that has only the dependencies: a head on loopback, with its dashboard and a token."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.conftest import make_recipe_factory

pytestmark = pytest.mark.timeout(900)  # a minute each on an idle machine

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("raysteer", "diffusion", "rewards", "glyphs", "evaluation", "actors", "learner", "cluster", "tests")
WAIT_S = 400.0

# Only the working directory holds this module, so a reward worker that finds it has the job's own code.
DETECTOR = """
import os
from pathlib import Path

import cluster
from tests.ray.faults import detector as judge


def detector(images):
    (Path(os.environ["RAYSTEER_TEST_FAULTS"]) / "code.txt").write_text(cluster.__file__)
    return judge(images)
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(listening.getsockname()[1]) for listening in sockets]
    for listening in sockets:
        listening.close()
    return ports


def wait_until(what: str, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {WAIT_S:.0f} s for {what}"
        time.sleep(0.2)


@dataclass
class Head:
    """A running cluster, a project folder whose code it does not have, and storage that both see."""

    url: str
    address: str
    token: str
    temporary: Path
    faults: Path
    project: Path
    storage: Path

    def environment(self, **changes: str | None) -> dict[str, str]:
        """Of a client; None removes a variable."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHONPATH"))}
        ours: dict[str, str | None] = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_TMPDIR": str(self.temporary),
            "HOME": str(self.temporary),
        }
        return inherited | {key: value for key, value in (ours | changes).items() if value is not None}

    def start(self, *arguments: str, program: tuple[str, ...] = ("-m", "cluster")) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *program, *arguments],
            cwd=self.project,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **changes: str | None) -> tuple[int, str]:
        """Exit code and all output of ``raysteer ...`` in the project folder."""
        done = subprocess.run(
            [sys.executable, "-m", "cluster", *arguments],
            cwd=self.project,
            env=self.environment(**changes),
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )
        return done.returncode, done.stdout + done.stderr

    def plan_faults(self, **faults: int) -> None:
        for mark in self.faults.glob("*"):
            mark.unlink()
        (self.faults / "plan.json").write_text(json.dumps(faults))


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Path, tiny_clip: Path) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("jobs")
    short, faults, project = Path(tempfile.mkdtemp(prefix="rj")), folder / "faults", folder / "project"
    faults.mkdir()
    project.mkdir()
    for name in PACKAGES:
        shutil.copytree(REPOSITORY / name, project / name, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    (project / "own_detector.py").write_text(DETECTOR)
    port, dashboard, client, agent = free_ports(4)
    token = secrets.token_hex(32)
    urls = (f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}")
    head = Head(*urls, token, short, faults, project, folder / "shared")
    changes = {
        "run.name": "job",
        "run.steps": 4,
        "run.storage": str(head.storage),
        "prompts.safe": "safe.txt",
        "prompts.unsafe": "unsafe.txt",
        "reward.detector": "own_detector:detector",
        "buffer.max_staleness": 0,
        "learner.batch_timeout_s": 240.0,
    }
    make_recipe_factory(project, tiny_pipeline, tiny_clip)(changes)
    environment = head.environment(
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # loopback only (see cluster.runtime)
        RAY_worker_niceness="0",
        RAY_DASHBOARD_STARTUP_TIMEOUT_S="180",  # this and the next: on a busy machine all is slow, and nothing is dead
        RAY_health_check_failure_threshold="100",
        RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="0",
        RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
        RAYSTEER_TEST_FAULTS=str(faults),
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    )
    command = f"""-m ray.scripts.scripts start --head --block --disable-usage-stats --num-cpus=4
        --object-store-memory={200 * 2**20} --port={port}
        --dashboard-host=127.0.0.1 --dashboard-port={dashboard} --dashboard-agent-listen-port={agent}
        --ray-client-server-port={client}""".split()
    printed = folder / "head.log"
    with printed.open("w") as log:
        process = subprocess.Popen([sys.executable, *command], env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        wait_until("the head", lambda: "Ray runtime started" in printed.read_text() or process.poll() is not None)
        assert process.poll() is None, printed.read_text()
        yield head
    finally:
        process.terminate()
        psutil.wait_procs(list(started_with(short)), timeout=30)
        for survivor in started_with(short):
            survivor.kill()
        process.wait(timeout=30)
        shutil.rmtree(short, ignore_errors=True)


def started_with(temporary: Path) -> Iterator[psutil.Process]:
    """The processes of the cluster that lives in this folder: Ray's do not all remain children of the one started."""
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAY_TMPDIR") == str(temporary):
                yield process
        except psutil.Error:  # gone meanwhile, or somebody else's
            continue


def answers(head: Head, token: bool = True) -> int:
    """HTTP status of a request for the list of jobs; 0 while nobody answers."""
    request = urllib.request.Request(f"{head.url}/api/jobs/")
    if token:
        request.add_header("Authorization", f"Bearer {head.token}")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def test_without_the_token_nobody_sees_or_submits_jobs(head: Head) -> None:
    assert (answers(head), answers(head, token=False)) == (200, 401)


@pytest.mark.parametrize(
    ("mode", "token", "expected"),
    [
        (None, None, "it asks for a token, and there is none here"),
        ("token", "0" * 64, "it refuses our token"),
        ("disabled", None, "it asks for a token, and RAY_AUTH_MODE is disabled here"),
    ],
)
def test_a_missing_or_wrong_token_is_one_clear_line(
    head: Head, mode: str | None, token: str | None, expected: str
) -> None:
    there = ["--storage", str(head.storage), "--address", head.url]
    code, output = head.run("status", "job", *there, RAY_AUTH_MODE=mode, RAY_AUTH_TOKEN=token)
    assert code == 2, output
    assert expected in output and "RAY_AUTH_TOKEN" in output and len(output.splitlines()) == 1
    assert head.token not in output and (token or head.token) not in output


def test_a_run_that_would_join_without_the_token_is_refused_before_ray_tries(head: Head) -> None:
    joining = ["train", "recipe.yaml", f"cluster.address={head.address}"]
    code, output = head.run(*joining, RAY_AUTH_MODE=None, RAY_AUTH_TOKEN=None)
    assert code == 2 and len(output.splitlines()) == 1, output
    assert f"cluster.address {head.address}: it asks for a token, and there is none here" in output
    assert not head.storage.exists()


def test_a_job_whose_recipe_is_wrong_fails_at_once_and_says_why_in_its_log(head: Head) -> None:
    command = ["python", "-m", "cluster", "train", "recipe.yaml", "model.path=/nowhere/model"]
    job = head.start(
        *("job", "submit", "--address", head.url, "--working-dir", ".", "--", *command),
        program=("-m", "ray.scripts.scripts"),
    )
    log = job.communicate(timeout=WAIT_S)[0]
    assert job.returncode != 0
    assert "raysteer: model.path /nowhere/model: there is no such folder" in log
    assert "Traceback" not in log
    assert not head.storage.exists()


def test_a_submitted_run_is_watched_stopped_and_resumed_with_the_code_of_its_working_directory(head: Head) -> None:
    there = ["--storage", str(head.storage), "--address", head.url]
    submission = ["submit", "recipe.yaml", "sampling.eta=0.9", "--address", head.url]
    run = head.storage / "job"
    head.plan_faults(hold_after=2)  # the second step waits for its scores
    job = head.start(*submission)
    try:
        wait_until("a score to be held back", lambda: job.poll() is not None or list(head.faults.glob("holding-*")))
        code, shown = head.run("status", "job", *there)
        assert code == 0, shown
        assert shown.startswith("run ") and "job running for" in shown and "step 1 of 4, version 1" in shown
        assert ", job job-" in shown, "the id of the Ray job"
        code, shown = head.run("stop", "job", "--no-wait", *there)
        assert code == 0, shown
        (head.faults / "release").touch()
        log = job.communicate(timeout=WAIT_S)[0]
    finally:
        job.kill()
    assert job.returncode == 130, log
    assert "raysteer stop: a checkpoint is written" in log and "continue with: the same submission" in log, log
    assert "warning" not in log, "the cluster is this machine, so all files are where the recipe says"
    assert "working_dir_files" in (head.faults / "code.txt").read_text()
    assert head.token not in log
    code, shown = head.run("status", "job", "--storage", str(head.storage))
    assert "job stopped" in shown and "the same command continues it" in shown
    code, shown = head.run("stop", "job", "--storage", str(head.storage))
    assert code == 2 and "nobody is training it" in shown

    stopped_at = json.loads((run / "status.json").read_text())["step"]
    assert 1 <= stopped_at < 4
    head.plan_faults()
    (run / "stop.json").write_text("{}")  # left to a life of the run that is over
    code, log = head.run(*submission)
    assert code == 0, log
    assert f"step {stopped_at}/4" not in log and "step 4/4" in log
    assert (run / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["ledger"]["committed"]) == ("finished", 4, 8)
    assert not (run / "stop.json").exists()
