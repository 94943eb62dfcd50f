"""The MLflow server of a namespace: one for all runs in it, or there would be nothing to compare."""

from __future__ import annotations

from cluster.kubernetes.config import KubernetesConfig
from cluster.kubernetes.names import MLFLOW, PODS_ACCOUNT, select, shared_labels
from cluster.kubernetes.packed import MLFLOW_PORT
from cluster.kubernetes.pods import (
    CONTAINER_SECURITY,
    SCRATCH_MOUNTS,
    Manifest,
    environment,
    pod_spec,
    resources,
    scratch_volumes,
)
from cluster.kubernetes.storage import claim

_FOLDER = "/mlflow"


def mlflow_server(settings: KubernetesConfig) -> list[Manifest]:
    """Claim, Deployment and Service. The server listens on its pod's address, as a service must; the network policies
    say who may call it, and requests under any other host name than ours are refused.
    """
    metadata = {"name": MLFLOW, "namespace": settings.namespace, "labels": shared_labels("mlflow")}
    chosen = settings.mlflow
    return [
        claim(metadata, "ReadWriteOnce", chosen.storage_class, chosen.size),
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": metadata,
            "spec": {
                "replicas": 1,
                "strategy": {"type": "Recreate"},  # two servers would write one SQLite file
                "selector": select(component="mlflow"),
                "template": {"metadata": {"labels": shared_labels("mlflow")}, "spec": _pod(settings)},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {
                "type": "ClusterIP",
                "selector": select(component="mlflow")["matchLabels"],
                "ports": [{"name": "http", "port": MLFLOW_PORT, "targetPort": "http"}],
            },
        },
    ]


def server_command(settings: KubernetesConfig, folder: str = _FOLDER, host: str = "0.0.0.0") -> list[str]:
    """Command line of the server: database and artifacts below `folder`."""
    return [
        "mlflow",
        "server",
        f"--host={host}",
        f"--port={MLFLOW_PORT}",
        f"--workers={settings.mlflow.workers}",
        f"--backend-store-uri=sqlite:///{folder}/mlflow.db",
        f"--artifacts-destination={folder}/artifacts",
        f"--allowed-hosts={','.join(_allowed_hosts(settings))}",
    ]


def _allowed_hosts(settings: KubernetesConfig) -> list[str]:
    """Host headers that are answered: the service's names, the loopback of kubectl port-forward, and the recipe's."""
    service = [MLFLOW, f"{MLFLOW}.{settings.namespace}"]
    service += [f"{service[1]}.svc", f"{service[1]}.svc.cluster.local"]
    with_port = [f"{name}:{MLFLOW_PORT}" for name in (*service, "localhost", "127.0.0.1")]
    return [*with_port, *(form for host in settings.mlflow.hosts for form in (host, f"{host}:*"))]


def _pod(settings: KubernetesConfig) -> Manifest:
    health = {"httpGet": {"path": "/health", "port": "http"}}
    container = {
        "name": "mlflow",
        "image": settings.image,
        "command": server_command(settings),
        "ports": [{"name": "http", "containerPort": MLFLOW_PORT}],
        "env": environment({"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}),
        "resources": resources("1", settings.mlflow.memory),
        "startupProbe": health | {"periodSeconds": 5, "failureThreshold": 60},
        "readinessProbe": health | {"periodSeconds": 10, "timeoutSeconds": 5},
        "livenessProbe": health | {"periodSeconds": 20, "timeoutSeconds": 10, "failureThreshold": 6},
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [*SCRATCH_MOUNTS, {"name": "data", "mountPath": _FOLDER}],
    }
    data = {"name": "data", "persistentVolumeClaim": {"claimName": MLFLOW}}
    return pod_spec(settings, PODS_ACCOUNT, [container], [*scratch_volumes("2Gi"), data])
