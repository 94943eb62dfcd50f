"""What every pod of a run has: who it runs as, where it may write, which nodes it may go to."""

from __future__ import annotations

from typing import Any

from cluster.kubernetes.config import KubernetesConfig, NodesConfig, Toleration
from cluster.kubernetes.names import RUNS_CLAIM
from cluster.kubernetes.packed import VOLUME

Manifest = dict[str, Any]

USER = 10001  # as in the Dockerfile
HOME = "/home/raysteer"

#: no container may be root, gain rights, use kernel capabilities or write to its image
CONTAINER_SECURITY: Manifest = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
POD_SECURITY: Manifest = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
#: where a container may write: files that end with the pod
SCRATCH_MOUNTS = [{"name": "tmp", "mountPath": "/tmp"}, {"name": "home", "mountPath": HOME}]


def scratch_volumes(tmp: str, prefix: str = "") -> list[Manifest]:
    """The volumes of SCRATCH_MOUNTS; `tmp`: size of /tmp."""
    return [
        {"name": f"{prefix}tmp", "emptyDir": {"sizeLimit": tmp}},
        {"name": f"{prefix}home", "emptyDir": {"sizeLimit": "2Gi"}},
    ]


def runs_volume(settings: KubernetesConfig) -> Manifest:
    """The volume that all pods of all runs share."""
    claim = settings.storage.existing_claim or RUNS_CLAIM
    return {"name": "runs", "persistentVolumeClaim": {"claimName": claim}}


def runs_mount(writes: bool) -> Manifest:
    """Its mount; read-only unless the container `writes`."""
    return {"name": "runs", "mountPath": VOLUME} | ({} if writes else {"readOnly": True})


def environment(values: dict[str, str]) -> list[Manifest]:
    """Environment variables, sorted, with those that every container of ours gets."""
    always = {"HOME": HOME, "PYTHONDONTWRITEBYTECODE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    return [{"name": name, "value": value} for name, value in sorted((always | values).items())]


def resources(cpus: str, memory: str, gpus: int = 0, gpu_resource: str = "") -> Manifest:
    """Requests equal to limits: what the scheduler counts is what the pod may use."""
    amounts = {"cpu": cpus, "memory": memory} | ({gpu_resource: str(gpus)} if gpus else {})
    return {"requests": dict(amounts), "limits": dict(amounts)}


def pod_spec(
    settings: KubernetesConfig, account: str, containers: list[Manifest], volumes: list[Manifest], **more: Any
) -> Manifest:
    """A pod that is nobody in the cluster: no token of the Kubernetes API, no links to services in its environment."""
    spec: Manifest = {
        "serviceAccountName": account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": POD_SECURITY,
        "containers": containers,
        "volumes": volumes,
    }
    if settings.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    return spec | {key: value for key, value in more.items() if value}


def placement(settings: KubernetesConfig, nodes: NodesConfig, spot: bool = False, gpus: int = 0) -> Manifest:
    """Node selector, tolerations and affinity; a pod that is not `spot` stays away from spot nodes."""
    selector, tolerations, affinity = dict(nodes.node_selector), [*nodes.tolerations], {}
    if gpus:
        tolerations.append(Toleration(key=settings.gpu_resource, effect="NoSchedule"))  # the usual taint of such nodes
    if settings.spot is not None and spot:
        selector |= settings.spot.node_selector
        tolerations += settings.spot.tolerations
    elif settings.spot is not None:
        affinity = _away_from(settings.spot.node_selector)
    return {
        "nodeSelector": dict(sorted(selector.items())),
        "tolerations": [_toleration(one) for one in tolerations],
        "affinity": affinity,
    }


def _toleration(one: Toleration) -> Manifest:
    if one.value is None:
        found: Manifest = {"key": one.key, "operator": "Exists"}
    else:
        found = {"key": one.key, "operator": "Equal", "value": one.value}
    return found | ({"effect": one.effect} if one.effect else {})


def _away_from(labels: dict[str, str]) -> Manifest:
    other = [{"key": key, "operator": "NotIn", "values": [value]} for key, value in sorted(labels.items())]
    terms = {"nodeSelectorTerms": [{"matchExpressions": [one]} for one in other]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}
