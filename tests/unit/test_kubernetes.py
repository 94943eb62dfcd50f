"""Manifests for Kubernetes: what a rendered run promises about its pods, its recipe and its files."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import load_recipe, recipe_from_dict
from cluster.kubernetes.packed import VOLUME
from cluster.kubernetes.render import Rendered, dump, manifests
from cluster.recipe_yaml import parse_yaml
from cluster.runtime import ROOT
from raysteer.errors import ConfigError
from tests.conftest import RecipeFactory

GOLDEN = Path(__file__).parents[1] / "golden"
RAY = "kubernetes.ray_version=2.60.0"  # else it is that of the installed Ray
SPOT = (
    "kubernetes.spot={node_selector: {capacity: spot}, tolerations: [{key: spot, value: 'true', effect: NoSchedule}]}"
)
RECIPES = {
    "glyphs": [RAY],
    # what docs/kubernetes.md shows: as many samplers as spot nodes give, between one and six
    "sd15-safediffusion-r1": [RAY, "samplers.count=1", "samplers.max=6", SPOT],
}


@pytest.fixture(scope="module")
def rendered() -> dict[str, Rendered]:
    return {name: manifests(load_recipe(ROOT / "recipes" / f"{name}.yaml", more)) for name, more in RECIPES.items()}


def ray_job(found: Rendered) -> dict[str, Any]:
    return next(one for one in found.run if one["kind"] == "RayJob")


def recipe_text(found: Rendered) -> str:
    return str(next(one for one in found.run if one["kind"] == "ConfigMap")["data"]["recipe.yaml"])


def recipe_data(found: Rendered) -> dict[str, Any]:
    return dict(parse_yaml(recipe_text(found), "recipe.yaml"))


def groups(found: Rendered) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in ray_job(found)["spec"]["rayClusterSpec"]["workerGroupSpecs"]}


def pods(found: Rendered) -> dict[str, dict[str, Any]]:
    """Pod specs by component."""
    spec = ray_job(found)["spec"]
    templates = [
        spec["submitterPodTemplate"],
        spec["rayClusterSpec"]["headGroupSpec"]["template"],
        *(group["template"] for group in groups(found).values()),
        *(one["spec"]["template"] for one in found.shared if one["kind"] == "Deployment"),
    ]
    return {one["metadata"]["labels"]["app.kubernetes.io/component"]: one["spec"] for one in templates}


def containers(found: Rendered) -> Iterator[dict[str, Any]]:
    for pod in pods(found).values():
        yield from pod["containers"]
    yield ray_job(found)["spec"]["rayClusterSpec"]["autoscalerOptions"]


@pytest.mark.parametrize("name", RECIPES)
def test_manifests_are_those_of_the_golden_file(name: str, rendered: dict[str, Rendered]) -> None:
    """RAYSTEER_UPDATE_GOLDEN=1 writes them anew; git diff then shows what changed."""
    file, text = GOLDEN / f"{name}.yaml", dump((*rendered[name].shared, *rendered[name].run))
    if os.environ.get("RAYSTEER_UPDATE_GOLDEN") == "1":
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def test_pods_read_the_very_recipe_that_was_rendered(rendered: dict[str, Rendered]) -> None:
    recipe = load_recipe(ROOT / "recipes" / "glyphs.yaml")
    text = recipe_text(rendered["glyphs"]).replace("/app/", f"{ROOT}/")  # in the image the repository is at /app
    there = recipe_from_dict(parse_yaml(text, "recipe.yaml"))
    assert there.fingerprint() == recipe.fingerprint()
    assert there.run.name == recipe.run.name


def test_a_retry_finds_its_run_on_the_shared_volume(rendered: dict[str, Rendered]) -> None:
    for found in rendered.values():
        job, data = ray_job(found)["spec"], recipe_data(found)
        assert job["backoffLimit"] == 3
        assert data["run"]["storage"].startswith(f"{VOLUME}/")
        head = pods(found)["head"]
        volume = next(one["name"] for one in head["containers"][0]["volumeMounts"] if one["mountPath"] == VOLUME)
        claims = {one["name"]: one.get("persistentVolumeClaim", {}).get("claimName") for one in head["volumes"]}
        [claim] = [one for one in found.shared if one["metadata"]["name"] == claims[volume]]
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_each_role_has_a_group_of_its_own_with_the_labels_it_asks_for(tiny_recipe: RecipeFactory) -> None:
    found = manifests(load_recipe(tiny_recipe(), ["samplers.labels={zone: a}"]))
    data = recipe_data(found)
    sections = {"sampler": "samplers", "reward-worker": "reward_workers", "learner": "learner"}
    assert set(groups(found)) == set(sections)
    for name, section in sections.items():
        assert groups(found)[name]["labels"] == data[section]["labels"]
    assert len({str(group["labels"]) for group in groups(found).values()}) == 3
    assert data["samplers"]["labels"] == {"zone": "a", "raysteer.role": "sampler"}


@pytest.mark.parametrize(
    ("asked", "cpus", "gpus"), [("0.5", 1, 0), ("2.5", 3, 0), ("0", 1, 0), ("1, num_gpus: 0.25", 1, 1)]
)
def test_one_member_fills_one_pod(tiny_recipe: RecipeFactory, asked: str, cpus: int, gpus: int) -> None:
    found = manifests(load_recipe(tiny_recipe(), [f"samplers={{num_cpus: {asked}, min: 2, max: 5}}"]))
    group, member = groups(found)["sampler"], recipe_data(found)["samplers"]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (2, 2, 5)
    assert (group["resources"]["CPU"], group["resources"].get("GPU", "0")) == (str(cpus), str(gpus))
    assert (member["num_cpus"], member["num_gpus"]) == (cpus, gpus)
    amounts = group["template"]["spec"]["containers"][0]["resources"]
    assert amounts["requests"] == amounts["limits"]
    assert amounts["limits"]["cpu"] == str(cpus)
    assert amounts["limits"].get("nvidia.com/gpu", "0") == str(gpus)


def test_the_evaluator_beside_training_gets_a_pod_of_the_samplers_group(tiny_recipe: RecipeFactory) -> None:
    evaluation = {"suite": "glyphs", "every": 1}
    changes = {"samplers": {"min": 1, "max": 3}, "evaluation": evaluation, "kubernetes": {"image": "r:1"}}
    group = groups(manifests(load_recipe(tiny_recipe(changes))))["sampler"]
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (2, 2, 4)


def test_an_elastic_learner_gives_elastic_pods(tiny_recipe: RecipeFactory) -> None:
    elastic = ["learner.workers=2", "learner.min_workers=1", "learner.resources={learner: 1}"]
    group = groups(manifests(load_recipe(tiny_recipe(), elastic)))["learner"]
    assert (group["minReplicas"], group["maxReplicas"]) == (1, 2)
    assert group["resources"]["learner"] == "1", "Ray Train counts elastic ranks by it"


def test_the_head_has_no_room_for_work(rendered: dict[str, Rendered]) -> None:
    for found in rendered.values():
        assert ray_job(found)["spec"]["rayClusterSpec"]["headGroupSpec"]["resources"] == {"CPU": "0"}


def test_no_container_is_privileged_in_any_way(rendered: dict[str, Rendered]) -> None:
    for found in rendered.values():
        for container in containers(found):
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert {"/tmp", "/home/raysteer"} <= {mount["mountPath"] for mount in container["volumeMounts"]}
        for pod in pods(found).values():
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["runAsUser"] > 0
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}


def test_only_the_autoscaler_can_call_the_kubernetes_api(rendered: dict[str, Rendered]) -> None:
    for found in rendered.values():
        assert all(pod["automountServiceAccountToken"] is False for pod in pods(found).values())
        tokens = {volume["name"] for pod in pods(found).values() for volume in pod["volumes"] if "projected" in volume}
        holders = [
            container
            for container in containers(found)
            if tokens & {mount["name"] for mount in container["volumeMounts"]}
        ]
        assert holders == [ray_job(found)["spec"]["rayClusterSpec"]["autoscalerOptions"]]


def test_ray_wants_a_token_from_everybody(rendered: dict[str, Rendered]) -> None:
    for found in rendered.values():
        assert ray_job(found)["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_only_who_must_can_write_to_the_shared_volume(rendered: dict[str, Rendered]) -> None:
    for found in rendered.values():
        writers = {
            name
            for name, pod in pods(found).items()
            for mount in pod["containers"][0]["volumeMounts"]
            if mount["mountPath"] == VOLUME and not mount.get("readOnly")
        }
        assert writers == {"head", "learner"}


def test_only_samplers_go_to_spot_nodes(rendered: dict[str, Rendered]) -> None:
    found = pods(rendered["sd15-safediffusion-r1"])
    spot = {"key": "spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
    assert [name for name, pod in found.items() if spot in pod.get("tolerations", [])] == ["sampler"]
    assert found["sampler"]["nodeSelector"] == {"capacity": "spot"}
    [avoided] = found["head"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    assert avoided == {"matchExpressions": [{"key": "capacity", "operator": "NotIn", "values": ["spot"]}]}
    assert found["head"]["affinity"] == found["learner"]["affinity"] == found["reward-worker"]["affinity"]
    assert "affinity" not in found["sampler"]


def test_two_runs_share_everything_but_their_own_part(tiny_recipe: RecipeFactory) -> None:
    first, second = (manifests(load_recipe(tiny_recipe(), [f"run.name={name}"])) for name in ("one", "two"))
    assert first.shared == second.shared
    names = [{(one["kind"], one["metadata"]["name"]) for one in found.run} for found in (first, second)]
    assert not names[0] & names[1]


def test_mlflow_takes_its_command_and_answers_under_the_name_the_run_calls(tiny_recipe: RecipeFactory) -> None:
    from mlflow.cli import server
    from mlflow.server.security_utils import is_allowed_host_header

    found = manifests(load_recipe(tiny_recipe(), ["kubernetes.mlflow.hosts=[mlflow.example]"]))
    program, command, *arguments = pods(found)["mlflow"]["containers"][0]["command"]
    assert (program, command) == ("mlflow", "server")
    options = server.make_context("server", list(arguments)).params  # parses, starts nothing
    [service] = [one for one in found.shared if one["kind"] == "Service"]
    called = f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert recipe_data(found)["tracking"]["uri"] == f"http://{called}"
    allowed = options["allowed_hosts"].split(",")
    for host in (called, "localhost:5000", "mlflow.example", "mlflow.example:8443"):
        assert is_allowed_host_header(allowed, host)
    for host in ("evil.example", "mlflow.example.evil", "raysteer-mlflow.evil:5000"):
        assert not is_allowed_host_header(allowed, host)


def test_a_run_with_a_tracking_server_gets_none_of_its_own(tiny_recipe: RecipeFactory) -> None:
    more = ["tracking.uri=http://mlflow.ml:5000", "kubernetes.egress=[{namespace: ml, port: 5000}]"]
    found = manifests(load_recipe(tiny_recipe(), more))
    assert "Deployment" not in {one["kind"] for one in found.shared}
    assert recipe_data(found)["tracking"]["uri"] == "http://mlflow.ml:5000"


def test_files_outside_the_image_are_looked_for_on_the_volume_and_listed(
    tiny_recipe: RecipeFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(tiny_recipe({"prompts.safe": "safe.txt", "model.path": f"{VOLUME}/inputs/sd15"}))
    found = manifests(recipe)
    data = recipe_data(found)
    assert data["prompts"]["safe"] == found.copies[str(tmp_path / "safe.txt")] == f"{VOLUME}/inputs/safe.txt"
    assert data["model"]["path"] == f"{VOLUME}/inputs/sd15"  # is there already, nothing to copy
    clip = str(recipe.reward.clip.model if recipe.reward.clip else "").removeprefix("local-dir:")
    assert data["reward"]["clip"]["model"] == f"local-dir:{found.copies[clip]}"


def test_a_run_that_draws_nothing_is_refused_by_its_key(tiny_recipe: RecipeFactory) -> None:
    recipe = load_recipe(tiny_recipe({"objective": {"name": "gdro"}, "offline": {"data": "runs/made"}}))
    with pytest.raises(ConfigError, match=r"offline.data.*raysteer submit"):
        manifests(recipe)


def test_weights_that_are_not_here_yet_are_listed_and_a_hub_name_is_not(rendered: dict[str, Rendered]) -> None:
    found = rendered["sd15-safediffusion-r1"]
    data = recipe_data(found)
    assert data["reward"]["clip"]["pretrained"] == f"{VOLUME}/inputs/weights/HPS_v2.1_compressed.pt"
    assert data["reward"]["clip"]["pretrained"] in found.copies.values()
    assert data["model"]["path"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"


def test_hostile_prompts_stay_prompts(tiny_recipe: RecipeFactory) -> None:
    prompts = ["---\nkind: Secret\n", "{{ .Values.x }}", "'; rm -rf / #", "$(reboot)", "/etc/passwd", "\u2028é"]
    found = manifests(load_recipe(tiny_recipe({"tracking.preview_prompts": prompts})))
    documents = list(yaml.safe_load_all(dump((*found.shared, *found.run))))
    assert documents == [*found.shared, *found.run]
    assert recipe_data(found)["tracking"]["preview_prompts"] == prompts
    assert ray_job(found)["spec"]["entrypoint"] == "python -m cluster train /etc/raysteer/recipe.yaml"


@pytest.mark.parametrize("text", ["1e3", "12e4", "0o17", "yes", "on", "null", "1_000", "0x1f", "1.5", "2024-01-01"])
def test_text_that_some_reader_takes_for_something_else_is_quoted(text: str) -> None:
    assert re.search(rf"^a: (['\"]){re.escape(text)}\1$", dump([{"a": text}]), re.MULTILINE)
