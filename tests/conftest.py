"""Fixtures for all tests: a quiet offline environment, tiny real models, tiny real recipes, one Ray cluster a
session.
"""

import os
import tempfile

# Before anything imports torch, ray, transformers or mlflow: they read these once.
for _key, _value in {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process for each run, and no test drains a node
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}.items():
    os.environ.setdefault(_key, _value)
os.environ.pop("RAY_ADDRESS", None)  # tests run on their own cluster, never on somebody's

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

RecipeFactory = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_pipeline() -> Path:
    """Folder of a random-weight StableDiffusionPipeline; read-only by agreement."""
    from tests import tiny

    return tiny.tiny_pipeline()


@pytest.fixture(scope="session")
def tiny_clip() -> Path:
    """Folder of a random-weight open_clip model, for ``local-dir:``; read-only by agreement."""
    from tests import tiny

    return tiny.tiny_clip()


@pytest.fixture
def tiny_recipe(tmp_path: Path, tiny_pipeline: Path, tiny_clip: Path) -> RecipeFactory:
    """Factory of recipe files with small real values: ``tiny_recipe({"run.steps": 3}) -> path of a YAML file``.

    Keyword ``name`` is the file name; a value of ``None`` in the dict is written as null, ``tiny_recipe.REMOVE``
    removes the key.
    """
    return make_recipe_factory(tmp_path, tiny_pipeline, tiny_clip)


REMOVE = object()


def make_recipe_factory(folder: Path, pipeline: Path, clip: Path) -> RecipeFactory:
    """The factory behind ``tiny_recipe``, for fixtures of a wider scope."""
    (folder / "safe.txt").write_text("a red circle\na blue square\na green triangle\n", encoding="utf-8")
    (folder / "unsafe.txt").write_text("a toxic sign\na hazard place\n", encoding="utf-8")
    base: dict[str, Any] = {
        "run": {
            "name": "tiny",
            "seed": 7,
            "steps": 2,
            "groups_per_step": 2,
            "storage": str(folder / "runs"),
            "checkpoint_every": 1,
        },
        "model": {"path": str(pipeline), "lora": {"rank": 2, "alpha": 4.0}},
        "sampling": {"steps": 4, "eta": 1.0, "guidance_scale": 2.0, "group_size": 2, "trained": {"count": 2}},
        "reward": {"clip": {"model": f"local-dir:{clip}", "batch_size": 4}, "alpha": 1.0},
        "optimizer": {"lr": 1e-3},
        "samplers": {"count": 1, "num_cpus": 0.1},
        "reward_workers": {"count": 1, "num_cpus": 0.1},
        "learner": {"workers": 1, "num_cpus": 0.1, "batch_timeout_s": 120.0},
        "buffer": {"max_staleness": 1},
        "prompts": {"safe": str(folder / "safe.txt"), "unsafe": str(folder / "unsafe.txt"), "unsafe_fraction": 0.5},
        "tracking": {"experiment": "tests", "preview_every": 0},
    }

    def build(changes: dict[str, Any] | None = None, name: str = "recipe.yaml") -> Path:
        data = copy.deepcopy(base)
        for key, value in (changes or {}).items():
            *sections, leaf = key.split(".")
            here = data
            for section in sections:
                here = here.setdefault(section, {})
            if value is REMOVE:
                here.pop(leaf, None)
            else:
                here[leaf] = value
        file = folder / name
        file.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
        return file

    return build


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """One local Ray cluster for the whole session, started by the code a run starts it with; yields the ``ray``
    module.
    """
    from cluster.config import ClusterConfig
    from cluster.runtime import init_ray
    from raysteer.errors import ClusterError

    folder = tempfile.mkdtemp(prefix="r")  # short: Ray puts unix sockets below it
    earlier = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = folder
    try:
        ray = init_ray(ClusterConfig(), num_cpus_needed=8)
    except ClusterError:  # Ray gives its processes 30 s; beside another test process that may be too little, once
        ray = init_ray(ClusterConfig(), num_cpus_needed=8)
    yield ray
    ray.shutdown()
    if earlier is None:
        del os.environ["RAY_TMPDIR"]
    else:
        os.environ["RAY_TMPDIR"] = earlier
    shutil.rmtree(folder, ignore_errors=True)
