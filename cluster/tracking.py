"""Tracking: exactly one MLflow writer per run.

The store is always named explicitly (a server, or an SQLite file below the run storage): MLflow's own default depends
on the working directory and on leftovers in it. A store that cannot be reached is refused at the start; one that goes
away later never stops a training: metrics wait and are sent with the next step, and every failed attempt is counted.
"""

import functools
import json
import logging
import os
import platform
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from pydantic import BaseModel, Field

import raysteer
from raysteer.errors import TrackingError

logger = logging.getLogger(__name__)

RUN_ID_FILE = "mlflow_run_id"
_PROBE_TIMEOUT_S = 5.0
_SQLITE = "sqlite:///"
_PACKAGES = ("torch", "ray", "diffusers", "transformers", "peft", "open_clip_torch", "mlflow", "numpy", "pyarrow")

# MLflow would otherwise retry a dead server for minutes, inside a training step.
_QUICK_FAILURE = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


class TrackingConfig(BaseModel, frozen=True, extra="forbid"):
    """Where metrics go. ``uri`` None means ``sqlite:///<run.storage>/mlflow.db``; previews are images of
    ``preview_prompts`` every ``preview_every`` adapter versions (0 turns them off)."""

    uri: str | None = Field(None, min_length=1)
    experiment: str = Field("raysteer", min_length=1)
    preview_every: int = Field(10, ge=0)
    preview_prompts: tuple[str, ...] = ()
    preview_seed: int = Field(0, ge=0)


def resolve_uri(cfg: TrackingConfig, storage: str | Path) -> str:
    """The tracking URI in use: ``cfg.uri``, or the SQLite file of the storage folder."""
    return cfg.uri or f"{_SQLITE}{(Path(storage) / 'mlflow.db').absolute()}"


def probe(uri: str, timeout_s: float = _PROBE_TIMEOUT_S) -> None:
    """Refuse a tracking store that cannot work, within ``timeout_s``.

    Raises:
        TrackingError: server silent or refusing, file store, folder that is not writable, unknown scheme.
    """
    scheme = urlsplit(uri).scheme
    if scheme in ("http", "https"):
        _probe_server(uri, timeout_s)
    elif scheme == "sqlite":
        folder = Path(uri.removeprefix(_SQLITE)).parent
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise TrackingError(
                f"tracking.uri {uri}", f"cannot write in {existing}", "choose a folder you may write in"
            )
    elif scheme in ("", "file"):
        raise TrackingError(
            f"tracking.uri {uri}",
            "MLflow no longer writes plain folders",
            "use sqlite:////path/mlflow.db or http://host:port",
        )
    elif scheme not in ("postgresql", "mysql", "mssql", "databricks"):
        raise TrackingError(
            f"tracking.uri {uri}", f"unknown kind {scheme!r}", "use sqlite:////path/mlflow.db or http://host:port"
        )


def _probe_server(uri: str, timeout_s: float) -> None:
    subject = f"tracking.uri {uri}"
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=timeout_s) as response:
            response.read(64)
    except urllib.error.HTTPError as error:
        if error.code == 403:
            raise TrackingError(
                subject,
                "the server refuses this host name (403)",
                "start it with --allowed-hosts, or use its IP address",
            ) from None
        if error.code in (401, 407):
            raise TrackingError(
                subject,
                f"the server wants credentials ({error.code})",
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
            ) from None
        if error.code != 404:  # an old server without /health is still a server
            raise TrackingError(subject, f"the server answers with error {error.code}", "look at its log") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise TrackingError(
            subject,
            f"no MLflow server answers ({reason})",
            "start it, correct the address, or drop tracking.uri to use a local SQLite file",
        ) from None


def environment() -> dict[str, str]:
    """Versions, git commit and platform of this process, for the record of a run."""
    found = {"raysteer": raysteer.__version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit = _git("rev-parse", "HEAD")
    if commit:
        found["git_commit"] = commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    return found


def _git(*arguments: str) -> str:
    folder = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


class Tracker:
    """The writer of one run. A run folder that already names an MLflow run continues it.

    Args:
        cfg: the tracking section.
        run_name: name shown in MLflow.
        run_dir: run folder; its parent is the storage folder; ``mlflow_run_id`` in it is read or written.
        params: flat recipe (``Recipe.flat()``).
        tags: further tags, such as the fingerprint.

    Raises:
        TrackingError: the store cannot be reached.
    """

    def __init__(
        self,
        cfg: TrackingConfig,
        run_name: str,
        run_dir: str | Path,
        params: Mapping[str, Any],
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self.cfg, self.run_dir = cfg, Path(run_dir)
        self.uri = resolve_uri(cfg, self.run_dir.parent)
        self.failures = 0
        self._pending: list[Any] = []
        probe(self.uri)
        self.client = open_client(self.uri)
        from mlflow.exceptions import MlflowException

        self._refusals = (MlflowException, OSError)
        try:
            self.run_id = self._continue() or self._create(run_name, params, dict(tags or {}))
        except self._refusals as error:
            raise TrackingError(
                f"tracking.uri {self.uri}", _reason(error), "check the server's log and your rights"
            ) from error

    def _continue(self) -> str | None:
        file = self.run_dir / RUN_ID_FILE
        if not file.exists():
            return None
        from mlflow.exceptions import MlflowException

        run_id = file.read_text(encoding="utf-8").strip()
        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST":
                raise
            logger.warning("MLflow run %s of %s is not in %s; a new one is started", run_id, file, self.uri)
            return None
        if run.info.lifecycle_stage == "deleted":
            logger.warning("MLflow run %s of %s was deleted; a new one is started", run_id, file)
            return None
        self.client.update_run(run_id, status="RUNNING")
        return run_id

    def _create(self, run_name: str, params: Mapping[str, Any], tags: dict[str, str]) -> str:
        from mlflow.entities import Param

        record = environment()
        tags |= {f"raysteer.{key}": value for key, value in record.items()}
        run = self.client.create_run(self._experiment_id(), run_name=run_name, tags=tags)
        run_id = str(run.info.run_id)
        entries = [Param(key, _shorten(value)) for key, value in params.items()]
        for start in range(0, len(entries), 100):  # the server's limit for one batch
            self.client.log_batch(run_id, params=entries[start : start + 100])
        self.client.log_dict(run_id, dict(params), "recipe.json")
        self.client.log_dict(run_id, record, "environment.json")
        self.run_dir.mkdir(parents=True, exist_ok=True)
        (self.run_dir / RUN_ID_FILE).write_text(run_id + "\n", encoding="utf-8")
        return run_id

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self.cfg.experiment
        found = self.client.get_experiment_by_name(name)
        if found is not None and found.lifecycle_stage == "deleted":
            raise TrackingError(
                f"tracking.experiment {name}",
                "the experiment was deleted in MLflow",
                "restore it or choose another name",
            )
        if found is not None:
            return str(found.experiment_id)
        # With SQLite, MLflow would put the artifacts into ./mlruns of whoever runs it.
        location = None
        if self.uri.startswith(_SQLITE):
            location = (Path(self.uri.removeprefix(_SQLITE)).parent.absolute() / "mlartifacts").as_uri()
        try:
            # The tag makes MLflow open the experiment as training runs with charts, not as traces of a chatbot.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return str(self.client.create_experiment(name, artifact_location=location, tags=kind))
        except MlflowException:
            found = self.client.get_experiment_by_name(name)  # another run made it meanwhile
            if found is None:
                raise
            return str(found.experiment_id)

    def log_metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Record the numbers of one step in one request; kept and sent with the next step if the store is away."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._pending += [
            Metric(_key(key), float(value), now, step) for key, value in values.items() if _is_number(value)
        ]
        self._flush()

    def _flush(self) -> None:
        sent = 0
        try:
            while sent < len(self._pending):
                self.client.log_batch(self.run_id, metrics=self._pending[sent : sent + 1000])
                sent = min(sent + 1000, len(self._pending))
        except self._refusals as error:
            self._count_failure("metrics", error)
        del self._pending[:sent]

    def log_images(self, step: int, images: np.ndarray, captions: Sequence[str]) -> None:
        """Record images, uint8 [n, H, W, 3]; image i appears under ``preview <i> <caption>`` and is comparable over
        steps.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) != len(captions):
            raise ValueError(f"images must be uint8 [n, H, W, 3] with n captions, got {images.dtype} {images.shape}")
        for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
            self._try("an image", functools.partial(self._log_image, step, index, image, caption))

    def _log_image(self, step: int, index: int, image: np.ndarray, caption: str) -> None:
        readable = "".join(c if c.isalnum() or c in " -_." else " " for c in caption)
        key = f"preview {index:02d} {' '.join(readable.split())}"[:80].strip()
        self.client.log_image(self.run_id, image, key=key, step=step, synchronous=True)

    def log_artifact(self, path: str | Path, subdir: str | None = None) -> None:
        """Upload a file, or a folder with all it holds."""
        upload = self.client.log_artifacts if Path(path).is_dir() else self.client.log_artifact
        self._try("artifact", lambda: upload(self.run_id, str(path), subdir))

    def log_table(self, columns: Mapping[str, Sequence[Any]], file: str) -> None:
        """Record a table, columns by name, as the JSON artifact ``file`` that MLflow shows side by side for several
        runs.
        """
        self._try("table", lambda: self.client.log_table(self.run_id, {k: list(v) for k, v in columns.items()}, file))

    def log_summary(self, values: Mapping[str, float], prefix: str = "") -> None:
        """Record final figures (an evaluation), as metrics without a step."""
        self.log_metrics(0, {f"{prefix}{key}": value for key, value in values.items()})

    def log_model(self, name: str, figures: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """Record an evaluated model as a LoggedModel of this run, so that models can be compared by their figures."""
        self._try("a model", lambda: self._log_model(name, figures, tags))

    def _log_model(self, name: str, figures: Mapping[str, float], tags: Mapping[str, str]) -> None:
        from mlflow.entities import LoggedModelStatus

        experiment = self.client.get_run(self.run_id).info.experiment_id
        model = self.client.create_logged_model(
            experiment, name=_key(name), source_run_id=self.run_id, tags=dict(tags), model_type="adapter"
        )
        for key, value in figures.items():
            self.client.log_metric(self.run_id, _key(f"evaluation/{key}"), value, model_id=model.model_id)
        self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set or replace tags."""
        self._try("tags", lambda: [self.client.set_tag(self.run_id, key, value) for key, value in tags.items()])

    def get_run_id(self) -> str:
        """MLflow's id of this run."""
        return self.run_id

    def finish(self, status: str = "FINISHED") -> int:
        """Send what is pending and close the run as FINISHED, FAILED or KILLED.

        Returns:
            Number of attempts to write that failed during the run.
        """
        self._flush()
        if self._pending:
            lost = self.run_dir / "unsent_metrics.jsonl"
            rows = [json.dumps({"step": m.step, "key": m.key, "value": m.value}) for m in self._pending]
            lost.write_text("\n".join(rows) + "\n", encoding="utf-8")
            logger.warning("%d metrics did not reach %s; they are in %s", len(rows), self.uri, lost)
        self._try("status", lambda: self.client.set_terminated(self.run_id, status=status.upper()))
        return self.failures

    def _try(self, what: str, action: Any) -> None:
        try:
            action()
        except self._refusals as error:
            self._count_failure(what, error)

    def _count_failure(self, what: str, error: Exception) -> None:
        self.failures += 1
        logger.warning("MLflow at %s did not take %s (failure %d): %s", self.uri, what, self.failures, _reason(error))


def open_client(uri: str) -> Any:
    """An ``MlflowClient`` of ``uri`` that gives up quickly. Imports mlflow (about a second)."""
    for key, value in _QUICK_FAILURE.items():
        os.environ.setdefault(key, value)
    if uri.startswith(_SQLITE):
        Path(uri.removeprefix(_SQLITE)).parent.mkdir(parents=True, exist_ok=True)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _key(name: str) -> str:
    """MLflow refuses a whole batch for one key with a character it does not know."""
    return re.sub(r"[^\w\-. /:]", "_", name)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:199] + "…"


def _shorten(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 500 else text[:499] + "…"
