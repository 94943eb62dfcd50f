"""The recipe's `kubernetes` section: only what cannot follow from the rest of the recipe, everything with a default."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field, model_validator

from raysteer import __version__

_LABEL_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")


def is_label_value(text: str) -> bool:
    """Whether Kubernetes and Ray both take it as the value of a label."""
    return text == "" or _LABEL_NAME.fullmatch(text) is not None


def is_label_key(text: str) -> bool:
    """Whether Kubernetes and Ray both take it as the key of a label: an optional DNS prefix, a slash, a name."""
    prefix, slash, name = text.rpartition("/")
    return _LABEL_NAME.fullmatch(name) is not None and (not slash or _HOST_NAME.fullmatch(prefix) is not None)


def _quantity(text: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]*(Mi|Gi|Ti)", text):
        raise ValueError("write a whole number with Mi, Gi or Ti, for example 16Gi")
    return text


def _dns_label(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", text):
        raise ValueError("use at most 63 lower-case letters, digits and -, beginning and ending with a letter or digit")
    return text


def _dns_name(text: str) -> str:
    if len(text) > 253 or not _HOST_NAME.fullmatch(text):
        raise ValueError("use a DNS name: lower-case letters, digits, - and dots")
    return text


def _labels(labels: dict[str, str]) -> dict[str, str]:
    for key, value in labels.items():
        if not is_label_key(key) or not is_label_value(value):
            raise ValueError(f"{key}: {value!r} is no label; use letters, digits, - _ . (and prefix/ before a key)")
    return labels


def _cidr(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text))
    except ValueError:
        raise ValueError("write a network as address/bits without host bits, for example 10.0.0.0/8") from None


def _resource_name(text: str) -> str:
    if not is_label_key(text) or "/" not in text:
        raise ValueError("write it as the device plugin names it, for example nvidia.com/gpu")
    return text


def _image(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][\w.:/@-]*", text):
        raise ValueError("write it as registry/name:tag or registry/name@digest")
    return text


Quantity = Annotated[str, AfterValidator(_quantity)]
DnsLabel = Annotated[str, AfterValidator(_dns_label)]
DnsName = Annotated[str, AfterValidator(_dns_name)]
Labels = Annotated[dict[str, str], AfterValidator(_labels)]
Cidr = Annotated[str, AfterValidator(_cidr)]


class Toleration(BaseModel, frozen=True, extra="forbid"):
    """A taint that pods put up with. `value` None: whatever its value."""

    key: str
    value: str | None = None
    effect: Literal["NoSchedule", "NoExecute", "PreferNoSchedule"] | None = None


class NodesConfig(BaseModel, frozen=True, extra="forbid"):
    """What the pods of one role need: `memory` None is estimated from the recipe (see sizes)."""

    memory: Quantity | None = None
    node_selector: Labels = Field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()


class HeadConfig(NodesConfig, frozen=True, extra="forbid"):
    """The head pod: driver, buffer, weight store, journal and tracker, and no model."""

    cpus: int = Field(default=2, ge=1)


class SpotConfig(BaseModel, frozen=True, extra="forbid"):
    """Nodes that may vanish, for samplers only; every other pod is kept away from nodes with these labels."""

    node_selector: Annotated[Labels, Field(min_length=1)]
    tolerations: tuple[Toleration, ...] = ()


class StorageConfig(BaseModel, frozen=True, extra="forbid"):
    """The volume of runs, inputs and model cache, shared by all pods, so its class must offer ReadWriteMany.

    `existing_claim` names a claim that is there already; `storage_class` None takes the cluster's default.
    """

    existing_claim: DnsName | None = None
    storage_class: DnsName | None = None
    size: Quantity = "100Gi"


class MlflowConfig(BaseModel, frozen=True, extra="forbid"):
    """The MLflow server of the namespace, rendered when the recipe's `tracking.uri` is null.

    `hosts` are further names under which it is reached, such as that of an ingress; its own are allowed anyway.
    """

    storage_class: DnsName | None = None
    size: Quantity = "20Gi"
    memory: Quantity = "2Gi"
    workers: int = Field(default=2, ge=1)
    hosts: tuple[DnsName, ...] = ()


class Egress(BaseModel, frozen=True, extra="forbid"):
    """A place outside the run that the head may call: a namespace of this cluster or a network, and the port there."""

    port: int = Field(ge=1, le=65535)
    namespace: DnsLabel | None = None
    cidr: Cidr | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Egress:
        if (self.namespace is None) == (self.cidr is None):
            raise ValueError("name either a namespace or a cidr")
        return self


class KubernetesConfig(BaseModel, frozen=True, extra="forbid"):
    """How a run is put on Kubernetes.

    `ray_version` is that of the image (None: the one installed here). `queue` is a Kueue LocalQueue. `retries` are new
    clusters after a failure, each of which continues the run. `start_deadline_s` bounds the wait for pods in each
    attempt, `deadline_s` each attempt as a whole; `idle_timeout_s` is when the autoscaler takes back an idle pod, and
    `ttl_s` how long a finished run's pods stay. Networks: `operator_namespace` is where KubeRay runs,
    `monitoring_namespace` where Prometheus does, `api_server_cidrs` where the Kubernetes API answers (for the
    autoscaler), `egress` what else the head may call.
    """

    namespace: DnsLabel = "raysteer"
    image: Annotated[str, AfterValidator(_image)] = f"raysteer:{__version__}"
    image_pull_secrets: tuple[DnsName, ...] = ()
    ray_version: str | None = Field(default=None, pattern=r"^[0-9]+\.[0-9]+\.[0-9]+$")
    gpu_resource: Annotated[str, AfterValidator(_resource_name)] = "nvidia.com/gpu"
    object_store: Quantity | None = None
    head: HeadConfig = HeadConfig()
    samplers: NodesConfig = NodesConfig()
    reward_workers: NodesConfig = NodesConfig()
    learner: NodesConfig = NodesConfig()
    spot: SpotConfig | None = None
    storage: StorageConfig = StorageConfig()
    mlflow: MlflowConfig = MlflowConfig()
    queue: DnsName | None = None
    retries: int = Field(default=3, ge=0)
    start_deadline_s: int = Field(default=3600, ge=1)
    deadline_s: int | None = Field(default=None, ge=1)
    idle_timeout_s: int = Field(default=300, ge=1)
    ttl_s: int = Field(default=600, ge=0)
    operator_namespace: DnsLabel = "kuberay-system"
    monitoring_namespace: DnsLabel | None = None
    api_server_cidrs: tuple[Cidr, ...] = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")
    egress: tuple[Egress, ...] = ()
