"""The recipe as a pod reads it: the same run, with the paths, the addresses and the sizes of the cluster."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.kubernetes.names import MLFLOW
from cluster.kubernetes.sizes import Sizes
from cluster.recipe_yaml import dump_yaml
from cluster.runtime import ROOT
from rewards.config import map_files

if TYPE_CHECKING:
    from cluster.config import Recipe

IMAGE_ROOT = "/app"
VOLUME = "/mnt/raysteer"
MLFLOW_PORT = 5000
_SHIPPED = ("glyphs", "recipes")  # folders of data in the image
_WEIGHTS = (".bin", ".pt", ".safetensors")  # where the file is not here, weights/x.pt looks like a name on the hub


@dataclass(frozen=True)
class PackedRecipe:
    """`text`: YAML. `copies`: files of this machine -> where the pods look for them, on the shared volume."""

    text: str
    copies: dict[str, str]


def pack(recipe: Recipe, sizes: Sizes) -> PackedRecipe:
    """Rewrite a recipe for the cluster. What decides training stays, so its fingerprint is the same.

    A path below the working directory is looked for below the volume's folder inputs, as is any other absolute one;
    files that come with raysteer are in the image.
    """
    copies: dict[str, str] = {}

    def place(path: str) -> str:
        here = Path(path).absolute() if path.endswith(_WEIGHTS) else Path(path)
        if not here.is_absolute() or here.is_relative_to(VOLUME):
            return path  # a hub name, or on the volume already
        if here.is_relative_to(ROOT) and here.relative_to(ROOT).parts[:1] in [(folder,) for folder in _SHIPPED]:
            return f"{IMAGE_ROOT}/{here.relative_to(ROOT).as_posix()}"
        base = Path.cwd() if here.is_relative_to(Path.cwd()) else Path(here.anchor)
        copies[str(here)] = f"{VOLUME}/inputs/{here.relative_to(base).as_posix()}"
        return copies[str(here)]

    data: dict[str, Any] = recipe.model_dump(mode="json")
    data["model"]["path"] = place(data["model"]["path"])
    data["reward"] = map_files(data["reward"], place)
    prompts = data["prompts"]
    for key in ("safe", "unsafe"):
        prompts[key] = None if prompts[key] is None else place(prompts[key])
    for source in prompts["sources"] or ():
        source["path"] = place(source["path"])
    data["run"]["storage"] = f"{VOLUME}/runs"
    data["tracking"]["uri"] = recipe.tracking.uri or f"http://{MLFLOW}:{MLFLOW_PORT}"
    data["cluster"] |= {"address": None, "autoscaling": True, "dashboard": False}
    for group in sizes.groups:
        member = {"num_cpus": float(group.cpus), "num_gpus": float(group.gpus), "labels": dict(group.labels)}
        data[group.section] |= member
    data["kubernetes"] = None
    return PackedRecipe(dump_yaml(data), copies)
