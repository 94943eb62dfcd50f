"""Manifests against the schemas of Kubernetes and, where its file is given, of KubeRay's RayJob."""

import copy
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from cluster.config import recipe_from_dict
from cluster.kubernetes.pods import USER
from cluster.kubernetes.render import manifests
from cluster.recipe_yaml import parse_yaml
from cluster.runtime import ROOT
from tests.unit.test_kubernetes import GOLDEN, RECIPES

GUIDE = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
KUBERNETES = kubernetes_validate.latest_version()
CRD_DIR = os.environ.get("RAYSTEER_CRD_DIR")
needs_crd = pytest.mark.skipif(CRD_DIR is None, reason="RAYSTEER_CRD_DIR names no folder with ray.io_rayjobs.yaml")


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((GOLDEN / f"{name}.yaml").read_text(encoding="utf-8")))


def ray_job(name: str) -> dict[str, Any]:
    return next(one for one in documents(name) if one["kind"] == "RayJob")


def pod_templates(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    return [job["spec"]["submitterPodTemplate"], *(group["template"] for group in groups)]


@pytest.mark.parametrize("name", RECIPES)
def test_core_objects_and_pods_fit_the_schemas_of_kubernetes(name: str) -> None:
    core = [one for one in documents(name) if one["kind"] != "RayJob"]
    pods = [{"apiVersion": "v1", "kind": "Pod"} | template for template in pod_templates(ray_job(name))]
    for one in (*core, *pods):
        kubernetes_validate.validate(one, KUBERNETES, strict=True)


def test_the_strict_schemas_notice_a_misspelt_field() -> None:
    pod = {"apiVersion": "v1", "kind": "Pod"} | pod_templates(ray_job("glyphs"))[0]
    pod["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="volumeMount"):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_the_pod_of_the_guide_fits_too() -> None:
    [text] = re.findall(r"<<'YAML'\n(.*?)\nYAML\n", GUIDE, re.DOTALL)
    kubernetes_validate.validate(yaml.safe_load(text), KUBERNETES, strict=True)


def test_the_settings_of_the_guide_are_accepted_by_the_recipe_it_names() -> None:
    [text] = re.findall(r"```yaml\n(kubernetes:.*?)```", GUIDE, re.DOTALL)
    recipe = parse_yaml((ROOT / "recipes" / "sd15-safediffusion-r1.yaml").read_text(encoding="utf-8"), "recipe")
    found = manifests(recipe_from_dict(recipe | parse_yaml(text, "guide")))
    [sampler, _, _] = found.run[-1]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert sampler["template"]["spec"]["nodeSelector"] == {"capacity": "spot", "gpu": "l4"}


def test_pods_run_as_the_user_of_the_image() -> None:
    assert f"USER {USER}:{USER}\n" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert f"runAsUser: {USER}" in GUIDE


@pytest.fixture(scope="module")
def ray_job_schema() -> jsonschema.Draft202012Validator:
    text = (Path(str(CRD_DIR)) / "ray.io_rayjobs.yaml").read_text(encoding="utf-8")
    crd = yaml.load(text, Loader=yaml.CSafeLoader)
    [version] = [one for one in crd["spec"]["versions"] if one["name"] == "v1"]
    return jsonschema.Draft202012Validator(strict(version["schema"]["openAPIV3Schema"]))


def strict(schema: Any) -> Any:
    """A structural schema of Kubernetes as JSON Schema that refuses unknown fields."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict) and not open_ended:
        made["additionalProperties"] = False
    return made


@needs_crd
@pytest.mark.parametrize("name", RECIPES)
def test_the_ray_job_fits_the_schema_of_kuberay(name: str, ray_job_schema: jsonschema.Draft202012Validator) -> None:
    assert [f"{error.json_path}: {error.message}" for error in ray_job_schema.iter_errors(ray_job(name))] == []


@needs_crd
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.backofLimit", 3),
        ("spec.backoffLimit", "three"),
        ("spec.rayClusterSpec.authOptions.mode", "none"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.serviceAcountName", "x"),
        ("spec.rayClusterSpec.autoscalerOptions.version", "v3"),
    ],
)
def test_the_schema_of_kuberay_notices_a_mistake(
    path: str, value: Any, ray_job_schema: jsonschema.Draft202012Validator
) -> None:
    job = copy.deepcopy(ray_job("glyphs"))
    *sections, leaf = path.split(".")
    here = job
    for section in sections:
        here = here[section]
    here[leaf] = value
    [error] = ray_job_schema.iter_errors(job)
    assert leaf in f"{error.json_path} {error.message}"
