"""From a recipe to files for `kubectl apply`: plain data, dumped by a YAML library, the same bytes every time."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml

from cluster.kubernetes.config import KubernetesConfig
from cluster.kubernetes.mlflow import mlflow_server
from cluster.kubernetes.names import object_name
from cluster.kubernetes.network import run_policies, shared_policies
from cluster.kubernetes.packed import VOLUME, pack
from cluster.kubernetes.pods import Manifest
from cluster.kubernetes.rayjob import ray_job, recipe_config
from cluster.kubernetes.sizes import sizes
from cluster.kubernetes.storage import accounts, namespace, runs_claim
from cluster.storage import write_atomic
from raysteer.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from cluster.config import Recipe


@dataclass(frozen=True)
class Rendered:
    """Manifests of one recipe.

    Attributes:
        name: of the RayJob.
        shared: what all runs of the namespace share; applying it again changes nothing.
        run: what belongs to this run.
        copies: files of this machine -> where the pods look for them, on the shared volume.
    """

    name: str
    shared: tuple[Manifest, ...]
    run: tuple[Manifest, ...]
    copies: dict[str, str]


def manifests(recipe: Recipe) -> Rendered:
    """All manifests of a recipe.

    Raises:
        ConfigError: a setting that cannot work on Kubernetes, with its key.
        ModelError: a weights file is torn.
    """
    settings = recipe.kubernetes or KubernetesConfig()
    with_mlflow = recipe.tracking.uri is None
    _check_tracking(recipe, settings)
    if recipe.offline is not None and recipe.offline.data is not None:
        remedy = "pods are laid out for runs that draw their images: leave it out, or use raysteer submit"
        raise ConfigError("offline.data", recipe.offline.data, remedy)
    pods = sizes(recipe, settings)
    packed = pack(recipe, pods)
    return Rendered(
        name=object_name(recipe.run.name),
        shared=(
            namespace(settings),
            *accounts(settings),
            *runs_claim(settings),
            *shared_policies(settings, with_mlflow),
            *(mlflow_server(settings) if with_mlflow else ()),
        ),
        run=(
            *run_policies(settings, recipe.run.name, with_mlflow, downloads=not recipe.model.local_files_only),
            recipe_config(settings, recipe, packed),
            ray_job(settings, recipe, pods),
        ),
        copies=packed.copies,
    )


def write(rendered: Rendered, out: str) -> list[Path]:
    """Write manifests to `out`: one file (*.yaml), or a folder with shared.yaml and a file named after the run.

    Raises:
        StorageError: the place cannot be written.
    """
    target = Path(out)
    if target.suffix in (".yaml", ".yml") and not target.is_dir():
        files = {target: (*rendered.shared, *rendered.run)}
    else:
        files = {target / "shared.yaml": rendered.shared, target / f"{rendered.name}.yaml": rendered.run}
    for file, documents in files.items():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, dump(documents).encode())
        except OSError as error:
            raise StorageError(f"--out {out}", f"cannot write {file} ({error.strerror})", "choose another") from None
    return list(files)


def dump(documents: Iterable[Manifest]) -> str:
    """A stream of YAML documents."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, explicit_start=True)


def _check_tracking(recipe: Recipe, settings: KubernetesConfig) -> None:
    """Refuse a tracking store that the head cannot reach: a file of this machine, or a server behind a closed door."""
    uri = recipe.tracking.uri
    if uri is None:
        return
    if urlsplit(uri).scheme == "sqlite":
        if not Path(uri.removeprefix("sqlite:///")).is_relative_to(VOLUME):
            remedy = "pods do not see this machine's files: set it to null for an MLflow server, or name yours"
            raise ConfigError("tracking.uri", uri, remedy)
    elif not settings.egress:
        raise ConfigError(
            "kubernetes.egress",
            None,
            f"tracking.uri {uri} is outside the run, so say where: [{{namespace: NAME, port: 5000}}] or "
            "[{cidr: 10.1.2.3/32, port: 443}]; or set tracking.uri to null for a server of its own",
        )


class _Dumper(yaml.SafeDumper):
    """Text of several lines as a block, nothing by reference, and quotes around all that any reader of YAML 1.1 or 1.2
    could take for a number.
    """

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
_NUMBER_ELSEWHERE = re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9]*[eE][-+]?[0-9]+|0o[0-7]+)$")  # but text for PyYAML
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER_ELSEWHERE, list("-+0123456789"))
