"""Dealings with Ray that can go wrong, as one line for a person: calls of actors and puts into the object store.

Used inside actors, ranks and the driver alike. Every answer has a deadline, and whoever does not give it is named.
"""

from __future__ import annotations

import re
from typing import Any

from raysteer.errors import ClusterError, DeadlineExceeded

AGAIN = "the same command continues the run"


def ask(method: Any, *arguments: Any, timeout_s: float = 120.0) -> Any:
    """Call an actor's method and wait, but not for ever.

    Raises:
        ClusterError: its process is dead, or the object store is full.
        DeadlineExceeded: no answer.
        Exception: what the method itself raised.
    """
    import ray

    try:
        return ray.get(method.remote(*arguments), timeout=timeout_s)
    except ray.exceptions.GetTimeoutError as error:
        hint = "its process is stuck: is the machine overloaded? see the Ray logs"
        raise DeadlineExceeded(f"the answer to {method._method_name}()", timeout_s, hint) from error
    except ray.exceptions.RayError as error:
        raise plain(error) from error


def plain(error: Exception) -> Exception:
    """A Ray error as what is behind it: what the actor raised, that its process died, that the object store is full."""
    import ray
    from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayActorError, RayTaskError

    while isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    if isinstance(error, RayActorError):
        named = re.search(r"class_name: (\w+)", str(error))
        return ClusterError(named[1] if named else "a service actor", "its process died", AGAIN)
    if isinstance(error, ObjectStoreFullError | OutOfDiskError):
        return ClusterError(
            f"object store of node {ray.util.get_node_ip_address()}",
            f"it is full, and cannot spill to disk ({type(error).__name__})",
            f"free space below RAY_TMPDIR or /tmp/ray, or raise cluster.object_store_mb; {AGAIN}",
        )
    return error


def put(value: Any) -> Any:
    """A reference to `value` in the object store of this node.

    Raises:
        ClusterError: the store and the disk it spills to are full.
    """
    import ray

    try:
        return ray.put(value)
    except ray.exceptions.RayError as error:
        raise plain(error) from error
