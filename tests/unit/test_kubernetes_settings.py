"""Names and settings of a run on Kubernetes: valid, distinct, and refused in one line where they cannot work."""

import re

import pytest

from cluster.config import Recipe, load_recipe
from cluster.kubernetes.names import LONGEST_NAME, object_name
from cluster.kubernetes.render import manifests
from raysteer.errors import ConfigError
from tests.conftest import RecipeFactory
from tests.unit.test_kubernetes import ray_job


@pytest.mark.parametrize("name", ["glyphs", "a", "Glyphs", "1e3", "a.b", "a_b", "a-b", "x-", "_-_", "9" * 99, "z" * 48])
def test_an_object_name_is_valid_short_and_says_which_run_it_is(name: str) -> None:
    made = object_name(name)
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", made)
    assert len(made) <= LONGEST_NAME
    assert made == name or re.search(r"-[0-9a-f]{6}$", made)


def test_two_run_names_never_meet_in_one_object_name() -> None:
    names = ["a.b", "a_b", "a-b", "A-b", "a--b", "z" * 48, "z" * 49, "z" * 47]
    assert len({object_name(name) for name in names}) == len(names)


def test_a_queue_means_a_fixed_size_and_no_autoscaler(tiny_recipe: RecipeFactory) -> None:
    job = ray_job(manifests(load_recipe(tiny_recipe(), ["kubernetes.queue=team"])))
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert job["spec"]["shutdownAfterJobFinishes"] is True  # or Kueue could not take the pods back
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is False
    assert "autoscalerOptions" not in cluster
    assert not [volume for volume in cluster["headGroupSpec"]["template"]["spec"]["volumes"] if "projected" in volume]


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("kubernetes.namespce=x", "kubernetes.namespce", "did you mean kubernetes.namespace?"),
        ("kubernetes.namespace=My_Space", "kubernetes.namespace", "lower-case"),
        ("kubernetes.image='a b'", "kubernetes.image", "registry/name:tag"),
        ("kubernetes.head.memory=8G", "kubernetes.head.memory", "16Gi"),
        ("kubernetes.storage.size=100", "kubernetes.storage.size", "text"),
        ("kubernetes.gpu_resource=gpu", "kubernetes.gpu_resource", "nvidia.com/gpu"),
        ("kubernetes.api_server_cidrs=[10.0.0.1/8]", "kubernetes.api_server_cidrs.0", "10.0.0.0/8"),
        ("kubernetes.egress=[{port: 443}]", "kubernetes.egress.0", "a namespace or a cidr"),
        ("kubernetes.samplers.node_selector={a: b c}", "kubernetes.samplers.node_selector.a", "label"),
        ("kubernetes.spot={node_selector: {}}", "kubernetes.spot.node_selector", "at least 1"),
        ("kubernetes.mlflow.hosts=['*']", "kubernetes.mlflow.hosts.0", "DNS name"),
        ("kubernetes={queue: team, storage: {}}", "kubernetes.queue", "samplers may be 1 to 4"),
        ("kubernetes.learner.memory=2Gi", "kubernetes.learner.memory", "2Gi of it: raise it"),
        ("samplers.labels={zone: '!a'}", "samplers.labels.zone", "plain value"),
        ("samplers.labels={ray.io/x: a}", "samplers.labels.ray.io/x", "ray.io/"),
        ("samplers.resources={\"a'; reboot '\": 1}", "samplers.resources.a'; reboot '", "letters"),
        ("tracking.uri=http://mlflow.ml:5000", "kubernetes.egress", "tracking.uri http://mlflow.ml:5000"),
        ("tracking.uri=sqlite:////home/me/mlflow.db", "tracking.uri", "set it to null"),
    ],
)
def test_a_setting_that_cannot_work_names_key_and_remedy(
    tiny_recipe: RecipeFactory, override: str, key: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        manifests(load_recipe(tiny_recipe({"samplers.max": 4}), [override]))
    assert caught.value.key == key
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_where_a_run_is_put_is_not_who_it_is(tiny_recipe: RecipeFactory) -> None:
    def fingerprint(*more: str) -> str:
        recipe: Recipe = load_recipe(tiny_recipe(), list(more))
        return recipe.fingerprint()

    assert fingerprint("kubernetes.image=other:1") == fingerprint()
