"""The run itself: a ConfigMap with its recipe, and a RayJob (ray.io/v1, KubeRay 1.7) that trains it.

The job is submitted by a pod of its own (K8sJobMode): its log is the log of the run, it submits again when the head
was lost, and, unlike a submitter inside the head's pod, it can be given a security context. The head does no work of
Ray's; driver and service actors live there.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from cluster.kubernetes.config import KubernetesConfig
from cluster.kubernetes.names import HEAD_ACCOUNT, PODS_ACCOUNT, object_name, run_labels
from cluster.kubernetes.packed import VOLUME, PackedRecipe
from cluster.kubernetes.pods import (
    CONTAINER_SECURITY,
    SCRATCH_MOUNTS,
    Manifest,
    environment,
    placement,
    pod_spec,
    resources,
    runs_mount,
    runs_volume,
    scratch_volumes,
)
from cluster.kubernetes.sizes import Group, Sizes, shared_memory

if TYPE_CHECKING:
    from cluster.config import Recipe

RECIPE_FOLDER = "/etc/raysteer"
DASHBOARD_PORT, GCS_PORT, METRICS_PORT = 8265, 6379, 8080
_API_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"
_TMP = "20Gi"  # Ray's logs, and what a full object store spills
_STOP_S = "300"  # a driver that is told to stop writes a checkpoint first; Ray's own patience is 3 s
_STAY = {  # tells the two common node autoscalers not to empty this node for thrift
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "karpenter.sh/do-not-disrupt": "true",
}


def recipe_config(settings: KubernetesConfig, recipe: Recipe, packed: PackedRecipe) -> Manifest:
    """The ConfigMap that pods mount at RECIPE_FOLDER."""
    name = object_name(recipe.run.name)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-recipe", "namespace": settings.namespace, "labels": run_labels(name, "recipe")},
        "data": {"recipe.yaml": packed.text},
    }


def ray_job(settings: KubernetesConfig, recipe: Recipe, sizes: Sizes) -> Manifest:
    """The RayJob. Each retry is a new cluster; it finds the run by its name on the shared volume and continues it."""
    name = object_name(recipe.run.name)
    queue = {} if settings.queue is None else {"kueue.x-k8s.io/queue-name": settings.queue}
    spec: Manifest = {
        "entrypoint": f"python -m cluster train {RECIPE_FOLDER}/recipe.yaml",
        "submissionMode": "K8sJobMode",
        "backoffLimit": settings.retries,
        "preRunningDeadlineSeconds": settings.start_deadline_s,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": settings.ttl_s,
        "submitterPodTemplate": _submitter(settings, name),
        "rayClusterSpec": _ray_cluster(settings, recipe, sizes, name),
    }
    if settings.deadline_s is not None:
        spec["activeDeadlineSeconds"] = settings.deadline_s
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "namespace": settings.namespace, "labels": run_labels(name, "job") | queue},
        "spec": spec,
    }


def _ray_cluster(settings: KubernetesConfig, recipe: Recipe, sizes: Sizes, name: str) -> Manifest:
    scales = settings.queue is None  # Kueue admits clusters of a fixed size
    cluster: Manifest = {
        "rayVersion": settings.ray_version or version("ray"),
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": scales,
    }
    if scales:
        cluster["autoscalerOptions"] = _autoscaler(settings)
    offline = recipe.model.local_files_only
    workers = [_worker_group(settings, group, sizes.object_store, name, offline) for group in sizes.groups]
    return cluster | {"headGroupSpec": _head(settings, sizes, name, scales, offline), "workerGroupSpecs": workers}


def _autoscaler(settings: KubernetesConfig) -> Manifest:
    """Only this container gets a token of the Kubernetes API; its rights are those that KubeRay gives an autoscaler."""
    mounts = [{"name": f"autoscaler-{mount['name']}", "mountPath": mount["mountPath"]} for mount in SCRATCH_MOUNTS]
    return {
        "version": "v2",
        "upscalingMode": "Default",
        "idleTimeoutSeconds": settings.idle_timeout_s,
        "resources": resources("500m", "1Gi"),
        "securityContext": CONTAINER_SECURITY,
        "env": environment({}),
        "volumeMounts": [*mounts, {"name": "api-access", "mountPath": _API_FOLDER, "readOnly": True}],
    }


def _api_access() -> Manifest:
    """Token, certificate and namespace as Kubernetes itself would mount them, but for one container."""
    namespace = {"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}
    sources = [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {"downwardAPI": {"items": [namespace]}},
    ]
    return {"name": "api-access", "projected": {"sources": sources}}


def _head(settings: KubernetesConfig, sizes: Sizes, name: str, scales: bool, offline: bool) -> Manifest:
    ports = {"gcs-server": GCS_PORT, "dashboard": DASHBOARD_PORT, "metrics": METRICS_PORT}
    container = _ray_container(settings, "ray-head", offline, {"RAY_JOB_STOP_WAIT_TIME_S": _STOP_S}) | {
        "ports": [{"name": name, "containerPort": port} for name, port in ports.items()],
        "resources": resources(str(settings.head.cpus), sizes.head_memory),
    }
    container["volumeMounts"] = [
        *container["volumeMounts"],
        runs_mount(writes=True),
        {"name": "recipe", "mountPath": RECIPE_FOLDER, "readOnly": True},
    ]
    volumes = [*_ray_volumes(settings, sizes.object_store), {"name": "recipe", "configMap": {"name": f"{name}-recipe"}}]
    if scales:
        volumes += [*scratch_volumes("2Gi", prefix="autoscaler-"), _api_access()]
    return {
        "rayStartParams": _start_params(sizes.object_store),
        "resources": {"CPU": "0"},
        "template": {
            "metadata": {"labels": run_labels(name, "head"), "annotations": _STAY},
            "spec": pod_spec(settings, HEAD_ACCOUNT, [container], volumes, **placement(settings, settings.head)),
        },
    }


def _worker_group(settings: KubernetesConfig, group: Group, object_store: int, name: str, offline: bool) -> Manifest:
    container = _ray_container(settings, "ray-worker", offline) | {
        "ports": [{"name": "metrics", "containerPort": METRICS_PORT}],
        "resources": resources(str(group.cpus), group.memory, group.gpus, settings.gpu_resource),
    }
    container["volumeMounts"] = [*container["volumeMounts"], runs_mount(group.writes)]
    metadata: Manifest = {"labels": run_labels(name, group.component)}
    if not group.spot:
        metadata["annotations"] = _STAY
    offered = {"CPU": group.cpus} | ({"GPU": group.gpus} if group.gpus else {}) | dict(sorted(group.resources.items()))
    where = placement(settings, group.nodes, group.spot, group.gpus)
    return {
        "groupName": group.component,
        "replicas": group.fewest,
        "minReplicas": group.fewest,
        "maxReplicas": group.most,
        "labels": dict(sorted(group.labels.items())),
        "resources": {resource: f"{amount:g}" for resource, amount in offered.items()},
        "rayStartParams": _start_params(object_store),
        "template": {
            "metadata": metadata,
            "spec": pod_spec(settings, PODS_ACCOUNT, [container], _ray_volumes(settings, object_store), **where),
        },
    }


def _submitter(settings: KubernetesConfig, name: str) -> Manifest:
    container = {
        "name": "ray-job-submitter",
        "image": settings.image,
        "env": environment({}),
        "resources": resources("500m", "1Gi"),
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": SCRATCH_MOUNTS,
    }
    where = placement(settings, settings.head) | {"restartPolicy": "Never"}
    return {
        "metadata": {"labels": run_labels(name, "submitter")},
        "spec": pod_spec(settings, PODS_ACCOUNT, [container], scratch_volumes("2Gi"), **where),
    }


def _ray_container(
    settings: KubernetesConfig, name: str, offline: bool, more: dict[str, str] | None = None
) -> Manifest:
    """A container whose command KubeRay fills in (ray start). `more`: its own environment variables."""
    values = {"HF_HOME": f"{VOLUME}/huggingface", "MLFLOW_DISABLE_TELEMETRY": "true"} | (more or {})
    if offline:
        values |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return {
        "name": name,
        "image": settings.image,
        "env": environment(values),
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [*SCRATCH_MOUNTS, {"name": "shm", "mountPath": "/dev/shm"}],
    }


def _ray_volumes(settings: KubernetesConfig, object_store: int) -> list[Manifest]:
    memory = {"medium": "Memory", "sizeLimit": f"{shared_memory(object_store) // 2**20}Mi"}
    return [*scratch_volumes(_TMP), {"name": "shm", "emptyDir": memory}, runs_volume(settings)]


def _start_params(object_store: int) -> Manifest:
    return {"object-store-memory": str(object_store)}
