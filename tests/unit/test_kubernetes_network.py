"""Network policies, evaluated as Kubernetes does: who can open a connection to whom, and who cannot."""

import ipaddress
from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster.config import load_recipe
from cluster.kubernetes.render import manifests
from cluster.runtime import ROOT

PREFIX = "app.kubernetes.io/"
OURS = "raysteer"


@dataclass(frozen=True)
class Place:
    """A pod by its labels and namespace, or, with `address`, something outside the cluster."""

    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = OURS
    address: str | None = None


def ours(component: str, run: str | None = "tiny") -> Place:
    labels = {"part-of": "raysteer", "component": component} | ({} if run is None else {"instance": run})
    return Place({f"{PREFIX}{key}": value for key, value in labels.items()})


HEAD, SAMPLER, REWARD, LEARNER = (ours(part) for part in ("head", "sampler", "reward-worker", "learner"))
SUBMITTER, MLFLOW, OTHER_HEAD = ours("submitter"), ours("mlflow", None), ours("head", "other")
OPERATOR = Place({f"{PREFIX}name": "kuberay-operator"}, "kuberay-system")
NEIGHBOUR = Place({f"{PREFIX}name": "kuberay-operator"}, OURS)  # the label alone opens nothing
STRANGER = Place({"app": "x"}, "default")
DNS = Place({"k8s-app": "kube-dns"}, "kube-system")
API_SERVER = Place(address="10.96.0.1")
HUB = Place(address="18.172.134.1")
PROMETHEUS = Place({"app": "prometheus"}, "monitoring")


def chosen(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    for rule in selector.get("matchExpressions", []):
        assert rule["operator"] == "NotIn"
        wanted = wanted and labels.get(rule["key"]) not in rule["values"]
    return wanted


def is_peer(peer: dict[str, Any], place: Place) -> bool:
    if "ipBlock" in peer:
        return place.address is not None and (
            ipaddress.ip_address(place.address) in ipaddress.ip_network(peer["ipBlock"]["cidr"])
        )
    if place.address is not None:
        return False
    if "namespaceSelector" in peer:
        inside = chosen(peer["namespaceSelector"], {"kubernetes.io/metadata.name": place.namespace})
    else:
        inside = place.namespace == OURS
    return inside and chosen(peer.get("podSelector", {}), place.labels)


def passes(policies: list[dict[str, Any]], pod: Place, other: Place, port: int, direction: str) -> bool:
    """Whether `pod` may be called by (Ingress) or may call (Egress) `other`; a pod no policy selects may."""
    if pod.address is not None or pod.namespace != OURS:
        return True
    key, side = direction.lower(), "from" if direction == "Ingress" else "to"
    about = [one["spec"] for one in policies if chosen(one["spec"]["podSelector"], pod.labels)]
    about = [spec for spec in about if direction in spec["policyTypes"]]
    return not about or any(
        any(is_peer(peer, other) for peer in rule[side])
        and ("ports" not in rule or port in [allowed["port"] for allowed in rule["ports"]])
        for spec in about
        for rule in spec[key]
    )


def connects(policies: list[dict[str, Any]], source: Place, target: Place, port: int) -> bool:
    return passes(policies, source, target, port, "Egress") and passes(policies, target, source, port, "Ingress")


def policies_of(*overrides: str) -> list[dict[str, Any]]:
    """Policies of a namespace with two runs, called tiny and other."""
    file = ROOT / "recipes" / "glyphs.yaml"
    both = [manifests(load_recipe(file, [f"run.name={run}", *overrides])) for run in ("tiny", "other")]
    found = [*both[0].shared, *(one for run in both for one in run.run)]
    return [one for one in found if one["kind"] == "NetworkPolicy"]


@pytest.fixture(scope="module")
def policies() -> list[dict[str, Any]]:
    return policies_of()


@pytest.mark.parametrize(
    ("source", "target", "port", "allowed"),
    [
        (OPERATOR, HEAD, 8265, True),
        (SUBMITTER, HEAD, 8265, True),
        (STRANGER, HEAD, 8265, False),
        (NEIGHBOUR, HEAD, 8265, False),
        (MLFLOW, HEAD, 8265, False),
        (OTHER_HEAD, HEAD, 8265, False),
        (HUB, HEAD, 8265, False),
        (OPERATOR, HEAD, 6379, False),
        (SUBMITTER, HEAD, 6379, False),
        (SUBMITTER, SAMPLER, 8265, False),
        (STRANGER, HEAD, 6379, False),
        (SAMPLER, HEAD, 6379, True),
        (HEAD, LEARNER, 23456, True),
        (SAMPLER, REWARD, 12345, True),
        (SAMPLER, ours("sampler", "other"), 12345, False),
        (HEAD, MLFLOW, 5000, True),
        (OTHER_HEAD, MLFLOW, 5000, True),
        (HEAD, MLFLOW, 22, False),
        (SAMPLER, MLFLOW, 5000, False),
        (STRANGER, MLFLOW, 5000, False),
        (SAMPLER, DNS, 53, True),
        (HEAD, DNS, 443, False),
        (HEAD, API_SERVER, 443, True),
        (HEAD, API_SERVER, 6443, True),
        (SAMPLER, API_SERVER, 443, False),
        (SUBMITTER, API_SERVER, 443, False),
        (MLFLOW, API_SERVER, 443, False),
        (HEAD, HUB, 443, False),
        (SAMPLER, HUB, 443, False),
        (MLFLOW, HUB, 443, False),
        (PROMETHEUS, HEAD, 8080, False),
    ],
)
def test_who_talks_to_whom(
    policies: list[dict[str, Any]], source: Place, target: Place, port: int, allowed: bool
) -> None:
    assert connects(policies, source, target, port) is allowed


@pytest.mark.parametrize(
    ("override", "source", "target", "port"),
    [
        ("model.local_files_only=false", SAMPLER, HUB, 443),
        ("kubernetes.monitoring_namespace=monitoring", PROMETHEUS, LEARNER, 8080),
        ("kubernetes.egress=[{cidr: 18.172.0.0/16, port: 443}]", HEAD, HUB, 443),
        ("kubernetes.egress=[{namespace: default, port: 5000}]", HEAD, STRANGER, 5000),
        ("kubernetes.operator_namespace=default", Place(OPERATOR.labels, "default"), HEAD, 8265),
    ],
)
def test_a_setting_opens_one_door_that_is_closed_without_it(
    policies: list[dict[str, Any]], override: str, source: Place, target: Place, port: int
) -> None:
    assert not connects(policies, source, target, port)
    assert connects(policies_of(override), source, target, port)


def test_without_an_autoscaler_nobody_calls_the_kubernetes_api() -> None:
    assert not connects(policies_of("kubernetes.queue=team"), HEAD, API_SERVER, 443)
