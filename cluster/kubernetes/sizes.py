"""Worker groups of a recipe: one for each role, one pod for each of its members, sized by the plan's estimate.

A pod takes whole CPUs and whole GPUs, and its member takes all of them: Ray can then put no second member beside it,
beyond the pod's memory. Pods cannot share a GPU; a slice of one (MIG) is a resource of its own, see `gpu_resource`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.kubernetes.config import KubernetesConfig, NodesConfig, is_label_key, is_label_value
from raysteer.errors import ConfigError

if TYPE_CHECKING:
    from cluster.config import Recipe
    from cluster.memory import RoleMemory

ROLE_LABEL = "raysteer.role"
_GIB = 2**30
_HEAD_BYTES = 6 * _GIB  # driver, service actors, Ray's own processes: 2 GiB in the demo (docs/performance.md)
_GPU_PROCESS_BYTES = 4 * _GIB  # libraries of torch and CUDA in main memory
_UNKNOWN_BYTES = 16 * _GIB  # nothing is known of the model
_UNKNOWN_STORE_BYTES = 2 * _GIB
_CPU_MARGIN = 1.5  # the estimate is off by up to a quarter


@dataclass(frozen=True)
class Group:
    """Pods of one role.

    Attributes:
        section: the role's section of the recipe; component: its name in labels.
        fewest, most: members, hence pods.
        memory: limit of one pod, object store included.
        resources: custom resources one pod offers, by name; labels: Ray's labels of its nodes.
        writes: whether it writes to the shared volume.
    """

    section: str
    component: str
    fewest: int
    most: int
    cpus: int
    gpus: int
    memory: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    nodes: NodesConfig
    spot: bool
    writes: bool


@dataclass(frozen=True)
class Sizes:
    """All groups, the head's memory, and bytes of the object store of every pod."""

    groups: tuple[Group, ...]
    head_memory: str
    object_store: int


def sizes(recipe: Recipe, settings: KubernetesConfig) -> Sizes:
    """Work out the pods of a recipe.

    Raises:
        ConfigError: labels or resources that no node can carry, too little memory, or a queue for a run that grows.
        ModelError: a weights file is torn.
    """
    from cluster.plan import resolve

    plan = resolve(recipe)
    store = _object_store(plan.object_store, settings)
    roles = {one.role: one for one in plan.roles}
    evaluator = [roles[name] for name in ("evaluator",) if name in roles]
    groups = (
        _group("samplers", recipe, settings, roles["samplers"], store, *evaluator),
        _group("reward_workers", recipe, settings, roles["reward workers"], store),
        _group("learner", recipe, settings, roles["learner"], store),
    )
    for group in groups:
        if settings.queue is not None and group.most > group.fewest:
            raise ConfigError(
                "kubernetes.queue",
                settings.queue,
                f"a Kueue queue admits a run of one size, and {group.section} may be {group.fewest} to {group.most}: "
                "give one number, or no queue",
            )
    return Sizes(groups, _memory("head", settings.head, _HEAD_BYTES, store), store)


def shared_memory(object_store: int) -> int:
    """Bytes of /dev/shm: the object store, and what torch and NCCL keep there."""
    return object_store + _GIB


def to_bytes(quantity: str) -> int:
    """``"2Gi"`` -> 2147483648."""
    return int(quantity[:-2]) * {"Mi": 2**20, "Gi": 2**30, "Ti": 2**40}[quantity[-2:]]


def _object_store(estimate: int | None, settings: KubernetesConfig) -> int:
    """Every pod can hold all images and trajectories there are at once, so nothing ever spills."""
    if settings.object_store is not None:
        return to_bytes(settings.object_store)
    return max(1, math.ceil((estimate or _UNKNOWN_STORE_BYTES) / _GIB)) * _GIB


def _group(
    section: str, recipe: Recipe, settings: KubernetesConfig, role: RoleMemory, store: int, *guests: RoleMemory
) -> Group:
    """Pods of a section. `guests`: processes of another role that take a pod of this section each."""
    wanted: Any = getattr(recipe, section)
    nodes: NodesConfig = getattr(settings, section)
    if section == "learner":
        fewest, most = wanted.min_workers or wanted.workers, wanted.workers
    else:
        fewest, most = wanted.fewest, wanted.most
    _check_labels(section, wanted.labels)
    _check_resources(section, wanted.resources)
    component = {"samplers": "sampler", "reward_workers": "reward-worker", "learner": "learner"}[section]
    return Group(
        section=section,
        component=component,
        fewest=fewest + len(guests),
        most=most + len(guests),
        cpus=max(1, math.ceil(wanted.num_cpus)),
        gpus=math.ceil(wanted.num_gpus),
        memory=_memory(section, nodes, max(_host_bytes(one) for one in (role, *guests)), store),
        resources=wanted.resources,
        labels=wanted.labels | {ROLE_LABEL: component},
        nodes=nodes,
        spot=section == "samplers" and settings.spot is not None,
        writes=section == "learner" or not recipe.model.local_files_only,
    )


def _memory(section: str, nodes: NodesConfig, estimate: int, store: int) -> str:
    """Memory of a pod: what its processes take, and /dev/shm, which counts as theirs."""
    if nodes.memory is None:
        return f"{math.ceil((estimate + shared_memory(store)) / _GIB)}Gi"
    if to_bytes(nodes.memory) <= shared_memory(store):
        raise ConfigError(
            f"kubernetes.{section}.memory",
            nodes.memory,
            f"the object store and shared memory alone are {shared_memory(store) / _GIB:g}Gi of it: raise it, or set "
            "a smaller kubernetes.object_store",
        )
    return nodes.memory


def _host_bytes(role: RoleMemory) -> int:
    """Main memory of one process: all it holds on a CPU; beside a GPU the libraries, and the weights as they pass."""
    if not role.gpus:
        return int(role.total * _CPU_MARGIN) if role.total is not None else _UNKNOWN_BYTES
    weights = role.parts["weights"]
    return _UNKNOWN_BYTES if weights is None else _GPU_PROCESS_BYTES + weights + role.beside


def _check_labels(section: str, labels: Mapping[str, str]) -> None:
    for key, value in labels.items():
        if not is_label_key(key) or not is_label_value(value) or key.startswith("ray.io/"):
            raise ConfigError(
                f"{section}.labels.{key}",
                value,
                "on Kubernetes pods are given these labels, so each is one plain value: no condition such as in(a, b) "
                "or !a, and no key of ray.io/",
            )


def _check_resources(section: str, resources: Mapping[str, float]) -> None:
    for name, amount in resources.items():
        if not is_label_key(name):  # it ends up in a command line that KubeRay puts together
            raise ConfigError(f"{section}.resources.{name}", amount, "use letters, digits, - _ . in a resource's name")
