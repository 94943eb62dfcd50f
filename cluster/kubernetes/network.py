"""Who may talk to whom: nobody, and then each pair that must.

    operator, submitter ─8265→ head ←→ sampler, reward worker, learner (of the same run, any port)
    head ─5000→ MLflow        head ─443, 6443→ Kubernetes API (autoscaler)        all ─53→ DNS

A Kubernetes network policy only ever allows; what no policy allows is denied once any policy selects a pod.
"""

from __future__ import annotations

from cluster.kubernetes.config import KubernetesConfig
from cluster.kubernetes.names import APP, object_name, run_labels, select, shared_labels
from cluster.kubernetes.packed import MLFLOW_PORT
from cluster.kubernetes.pods import Manifest
from cluster.kubernetes.rayjob import DASHBOARD_PORT, METRICS_PORT

_NODE_LOCAL_DNS = "169.254.20.10/32"
_API_PORTS = (443, 6443)


def shared_policies(settings: KubernetesConfig, with_mlflow: bool) -> list[Manifest]:
    """For all pods of the namespace: deny everything, allow DNS, and let heads reach MLflow."""
    dns_servers = [_in_namespace("kube-system"), {"ipBlock": {"cidr": _NODE_LOCAL_DNS}}]
    dns = {"to": dns_servers, "ports": [*_ports(53, protocol="UDP"), *_ports(53)]}
    policies = [
        _policy(settings, "deny-all", shared_labels("network"), select(), ingress=[], egress=[]),
        _policy(settings, "dns", shared_labels("network"), select(), egress=[dns]),
    ]
    if with_mlflow:
        heads = {"from": [{"podSelector": select(component="head")}], "ports": _ports(MLFLOW_PORT)}
        policies.append(
            _policy(settings, "mlflow", shared_labels("network"), select(component="mlflow"), ingress=[heads])
        )
    return policies


def run_policies(settings: KubernetesConfig, run_name: str, with_mlflow: bool, downloads: bool) -> list[Manifest]:
    """For the pods of one run. `downloads`: its pods may fetch models from the hub."""
    name = object_name(run_name)
    labels = run_labels(name, "network")
    head, submitter = (select(instance=name, component=part) for part in ("head", "submitter"))
    ray = select(instance=name) | {
        "matchExpressions": [{"key": "app.kubernetes.io/component", "operator": "NotIn", "values": ["submitter"]}]
    }
    operator = _in_namespace(settings.operator_namespace) | {
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}
    }
    callers = {"from": [operator, {"podSelector": submitter}], "ports": _ports(DASHBOARD_PORT)}
    submit = {"to": [{"podSelector": head}], "ports": _ports(DASHBOARD_PORT)}
    policies = [
        _policy(
            settings,
            f"{name}-ray",
            labels,
            ray,
            ingress=[{"from": [{"podSelector": ray}]}],
            egress=[{"to": [{"podSelector": ray}]}],
        ),
        _policy(settings, f"{name}-dashboard", labels, head, ingress=[callers]),
        _policy(settings, f"{name}-submitter", labels, submitter, egress=[submit]),
    ]
    calls = _calls_of_the_head(settings, with_mlflow)
    if calls:
        policies.append(_policy(settings, f"{name}-head", labels, head, egress=calls))
    if settings.monitoring_namespace is not None:
        scrape = {"from": [_in_namespace(settings.monitoring_namespace)], "ports": _ports(METRICS_PORT)}
        policies.append(_policy(settings, f"{name}-metrics", labels, ray, ingress=[scrape]))
    if downloads:
        hub = {"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}], "ports": _ports(443)}
        policies.append(_policy(settings, f"{name}-hub", labels, ray, egress=[hub]))
    return policies


def _calls_of_the_head(settings: KubernetesConfig, with_mlflow: bool) -> list[Manifest]:
    calls = []
    if with_mlflow:
        calls.append({"to": [{"podSelector": select(component="mlflow")}], "ports": _ports(MLFLOW_PORT)})
    if settings.queue is None:  # there is an autoscaler
        networks = [{"ipBlock": {"cidr": cidr}} for cidr in settings.api_server_cidrs]
        calls.append({"to": networks, "ports": _ports(*_API_PORTS)})
    for allowed in settings.egress:
        place = {"ipBlock": {"cidr": allowed.cidr}} if allowed.cidr else _in_namespace(str(allowed.namespace))
        calls.append({"to": [place], "ports": _ports(allowed.port)})
    return calls


def _in_namespace(name: str) -> Manifest:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def _ports(*numbers: int, protocol: str = "TCP") -> list[Manifest]:
    return [{"protocol": protocol, "port": number} for number in numbers]


def _policy(
    settings: KubernetesConfig,
    name: str,
    labels: dict[str, str],
    pods: Manifest,
    ingress: list[Manifest] | None = None,
    egress: list[Manifest] | None = None,
) -> Manifest:
    """A policy over `pods`; None: it says nothing about that direction, []: nothing passes."""
    rules = {key: rules for key, rules in (("ingress", ingress), ("egress", egress)) if rules is not None}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": f"{APP}-{name}", "namespace": settings.namespace, "labels": labels},
        "spec": {"podSelector": pods, "policyTypes": [key.capitalize() for key in rules], **rules},
    }
