"""The one place that calls ``ray.init``: same guard, same environment, same answers wherever a run is started."""

import atexit
import logging
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.auth import check_token, guard_private_cluster
from cluster.jobs import surrounding_job
from raysteer.errors import ClusterError

if TYPE_CHECKING:
    from cluster.config import ClusterConfig

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
_PROBE_TIMEOUT_S = 3.0
_TOKEN_TIMEOUT_S = 10.0
_SETUP_HOOK = "raysteer.torchvision_guard.install"
_LOCAL_STORE_BYTES = (
    512 * 2**20
)  # images and latents of a few hundred groups; raise cluster.object_store_mb for big ones

# Must be set before ray is imported. With the default poll of 2 s every report of a Train worker waits for it.
_DRIVER_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "1",
}
# Ray's processes listen on every interface of a machine under Linux, on the loopback interface alone where this is 0
# (its default elsewhere, hence the name). Read when ray is imported.
_BEYOND_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_WORKER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
_NOBODYS_TOKEN = (
    "the dashboard will ask for a token that only this run knows; to have one of your own, which runs then use, "
    "type ray get-auth-token --generate before the run"
)
_PASSED_THROUGH = (
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_HOME",
    "MLFLOW_DISABLE_TELEMETRY",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "PYTHONDONTWRITEBYTECODE",
    "RAYSTEER_LOG",
)


def import_ray(private: bool) -> Any:
    """``ray``, after setting what it reads when it is imported.

    Args:
        private: for a cluster of our own: it asks for a token, and answers on the loopback interface only.
    """
    for key, value in _DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if not private or "ray" in sys.modules:
        import ray

        return ray
    earlier = os.environ.get(_BEYOND_LOOPBACK)
    os.environ[_BEYOND_LOOPBACK] = "0"
    try:
        import ray
    finally:
        del os.environ[_BEYOND_LOOPBACK]
        if earlier is not None:
            os.environ[_BEYOND_LOOPBACK] = earlier
    return ray


def target_address(cfg: "ClusterConfig") -> str | None:
    """Address to join, or None to start a cluster here.

    Inside ``ray job submit`` (RAY_ADDRESS set) the job's own cluster is used, so that one recipe serves both.

    Raises:
        ClusterError: no cluster where the recipe says there is one.
    """
    address = cfg.address or os.environ.get("RAY_ADDRESS") or None
    if address == "local":
        return None
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or _running_here()
        if address is None or address == "auto":
            raise ClusterError(
                "cluster.address auto",
                "no Ray cluster runs on this machine",
                "start one with ray start --head, or drop cluster.address",
            )
    return address


def probe_address(address: str, timeout_s: float = _PROBE_TIMEOUT_S) -> None:
    """Refuse an address nobody listens on. ``ray.init`` itself would keep trying for minutes.

    Raises:
        ClusterError: malformed address, no answer within ``timeout_s``, or a token that is missing or wrong.
    """
    subject = f"cluster.address {address}"
    if "://" in address:
        raise ClusterError(
            subject,
            "this is a client or dashboard URL",
            "use host:port of the head (its GCS port, 6379 by default), or ray job submit",
        )
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit() or not 0 < int(port) < 65536:
        raise ClusterError(subject, "this is not host:port", "use for example 10.0.0.5:6379, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
    except OSError as error:
        raise ClusterError(
            subject, f"nobody answers there ({error})", "start the cluster or correct the address"
        ) from None
    check_token(address, _TOKEN_TIMEOUT_S)


def probe_free_port(port: int, key: str) -> None:
    """Refuse a port of this machine that is taken.

    Raises:
        ClusterError: naming the key that chooses it.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ClusterError(
                f"{key} {port}",
                f"the port cannot be used ({error.strerror})",
                "choose another one or stop the program that holds it",
            ) from None


def init_ray(cfg: "ClusterConfig", num_cpus_needed: float, num_gpus_needed: float = 0.0) -> Any:
    """Join or start the cluster of a run and return ``ray``.

    A cluster started here is named by no file that others look at, listens on 127.0.0.1 only, asks for a token that
    its own processes alone know (unless the user has one, or RAY_AUTH_MODE is disabled), ends with this process, and
    has as many logical CPUs as the run needs, at least those of the machine.

    Args:
        cfg: the cluster section.
        num_cpus_needed: sum over all actors and learner workers.
        num_gpus_needed: the same for GPUs.

    Raises:
        ClusterError: unreachable, or too small for the run.
    """
    address = target_address(cfg)
    if address is not None:
        probe_address(address)
    else:
        if cfg.dashboard:
            probe_free_port(cfg.dashboard_port, "cluster.dashboard_port")
        # Ray reads the mode once; where it is imported already, its own default stands, which is a token too.
        if "ray" not in sys.modules and guard_private_cluster() and cfg.dashboard:
            logger.warning(_NOBODYS_TOKEN)
    ray = import_ray(private=address is None)
    if ray.is_initialized():
        check_capacity(ray.cluster_resources(), num_cpus_needed, num_gpus_needed, cfg.autoscaling)
        return ray
    common: dict[str, Any] = {
        "runtime_env": runtime_env(),
        "log_to_driver": os.environ.get("RAYSTEER_WORKER_LOGS", "0") == "1",
        "logging_level": logging.WARNING,
    }
    if address is not None:
        try:
            ray.init(address=address, **common)
        except (ConnectionError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ClusterError(
                f"cluster.address {address}",
                f"joining failed ({reason})",
                "check that Ray versions and RAY_AUTH_MODE agree on both sides",
            ) from error
    else:
        try:
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, -int(-num_cpus_needed // 1)),
                include_dashboard=cfg.dashboard,
                dashboard_host="127.0.0.1",
                dashboard_port=cfg.dashboard_port if cfg.dashboard else None,
                object_store_memory=cfg.object_store_mb * 2**20 if cfg.object_store_mb else _LOCAL_STORE_BYTES,
                **common,
            )
        except Exception as error:  # Ray raises bare Exceptions when one of its processes does not come up in time
            raise ClusterError(
                "Ray on this machine",
                f"it did not start ({' '.join(str(error).split())[:200]})",
                "free some memory or processor time and try again; its logs are below RAY_TMPDIR or /tmp/ray",
            ) from error
    atexit.register(ray.shutdown)
    try:
        check_capacity(ray.cluster_resources(), num_cpus_needed, num_gpus_needed, cfg.autoscaling)
    except ClusterError:
        ray.shutdown()
        raise
    return ray


def check_capacity(resources: dict[str, float], num_cpus: float, num_gpus: float, autoscaling: bool) -> None:
    """Refuse a cluster that can never hold the run: its actors would wait for ever.

    Raises:
        ClusterError: naming what is needed and what is there.
    """
    if autoscaling:
        return
    for kind, needed in (("CPU", num_cpus), ("GPU", num_gpus)):
        there = resources.get(kind, 0.0)
        if needed > there + 1e-6:
            raise ClusterError(
                f"cluster with {there:g} {kind}s",
                f"this recipe needs {needed:g}",
                f"lower samplers.count, reward_workers.count or learner.workers, or their num_{kind.lower()}s "
                "(cluster.autoscaling: true if the cluster grows on demand)",
            )


def runtime_env() -> dict[str, Any]:
    """What every worker process gets: the torchvision guard, one thread each, our packages, offline switches.

    In a submitted job the packages come with its working directory, which is on the path already, and what the job
    has set stays as it is: Ray refuses a driver that sets it again.
    """
    passed = {key: os.environ[key] for key in _PASSED_THROUGH if key in os.environ}
    ours: dict[str, Any] = {"worker_process_setup_hook": _SETUP_HOOK}
    environment = _WORKER_ENVIRONMENT | passed
    job = surrounding_job()
    if job is None:
        earlier = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{earlier}" if earlier else str(ROOT)
        return ours | {"env_vars": environment}
    theirs = job["runtime_env"]
    environment = {key: value for key, value in environment.items() if key not in theirs.get("env_vars", {})}
    return {key: value for key, value in ours.items() if key not in theirs} | {"env_vars": environment}


def _running_here() -> str | None:
    """Address of the cluster started on this machine, as ``ray start`` leaves it."""
    file = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir())) / "ray" / "ray_current_cluster"
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
