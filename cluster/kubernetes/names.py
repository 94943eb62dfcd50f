"""Names and labels. Shared things are called raysteer-*, those of a run after the run."""

import hashlib
import re

APP = "raysteer"
MLFLOW = "raysteer-mlflow"
RUNS_CLAIM = "raysteer-runs"
PODS_ACCOUNT = "raysteer"
HEAD_ACCOUNT = "raysteer-head"

#: KubeRay makes longer names of a RayJob's own, and refuses one above this
LONGEST_NAME = 47
_HASH_LENGTH = 6

Labels = dict[str, str]


def object_name(run_name: str) -> str:
    """Name of a run's objects: a DNS label that begins with a letter, of at most 47 characters.

    A run name that is one already stays as it is. Any other is lower-cased, everything but letters and digits becomes
    -, and the first six digits of its sha256 are appended, so that two run names never meet in one object name.
    """
    if len(run_name) <= LONGEST_NAME and re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", run_name):
        return run_name
    readable = re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")
    if not readable[:1].isalpha():
        readable = f"run-{readable}"
    digest = hashlib.sha256(run_name.encode()).hexdigest()[:_HASH_LENGTH]
    return f"{readable[: LONGEST_NAME - _HASH_LENGTH - 1].rstrip('-')}-{digest}"


def shared_labels(component: str) -> Labels:
    """Labels of what all runs of a namespace share; the same whatever the recipe, so that applying it again changes
    nothing.
    """
    return {
        "app.kubernetes.io/name": APP,
        "app.kubernetes.io/part-of": APP,
        "app.kubernetes.io/component": component,
    }


def run_labels(name: str, component: str) -> Labels:
    """Labels of what belongs to the run with this object name."""
    return shared_labels(component) | {"app.kubernetes.io/instance": name}


def select(**parts: str) -> dict[str, Labels]:
    """A label selector by the parts of our labels: ``select(instance="glyphs", component="head")``."""
    return {"matchLabels": {f"app.kubernetes.io/{part}": value for part, value in {"part-of": APP, **parts}.items()}}
