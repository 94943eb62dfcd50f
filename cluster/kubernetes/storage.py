"""What a namespace needs before its first run: the namespace itself, accounts without rights, the shared volume."""

from __future__ import annotations

from cluster.kubernetes.config import KubernetesConfig
from cluster.kubernetes.names import HEAD_ACCOUNT, PODS_ACCOUNT, RUNS_CLAIM, shared_labels
from cluster.kubernetes.pods import Manifest


def namespace(settings: KubernetesConfig) -> Manifest:
    """The namespace. Kubernetes itself then refuses pods below its "restricted" standard, ours or anybody's."""
    level = {f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "audit", "warn")}
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": settings.namespace, "labels": shared_labels("namespace") | level},
    }


def accounts(settings: KubernetesConfig) -> list[Manifest]:
    """Two accounts, neither with a token in its pods. KubeRay binds the head's to the role of its autoscaler."""
    return [
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": name, "namespace": settings.namespace, "labels": shared_labels("account")},
            "automountServiceAccountToken": False,
        }
        for name in (PODS_ACCOUNT, HEAD_ACCOUNT)
    ]


def runs_claim(settings: KubernetesConfig) -> list[Manifest]:
    """The claim of the shared volume, unless the recipe names one that is there already."""
    chosen = settings.storage
    if chosen.existing_claim is not None:
        return []
    metadata = {"name": RUNS_CLAIM, "namespace": settings.namespace, "labels": shared_labels("storage")}
    return [claim(metadata, "ReadWriteMany", chosen.storage_class, chosen.size)]


def claim(metadata: Manifest, mode: str, storage_class: str | None, size: str) -> Manifest:
    """A PersistentVolumeClaim; without a class, of the cluster's default one."""
    spec: Manifest = {"accessModes": [mode], "resources": {"requests": {"storage": size}}}
    if storage_class is not None:
        spec["storageClassName"] = storage_class
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}
