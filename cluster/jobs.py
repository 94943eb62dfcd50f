"""Ray jobs, over the HTTP interface of a cluster's dashboard: connect quickly or say why not, submit, follow."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import shlex
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.auth import mode, own_token, token_error
from raysteer.errors import ClusterError, DeadlineExceeded, UserError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
EXIT_STOPPED = 130  # of a job that was ended from outside, as of a command that was interrupted
_PROBE_S = 5.0
_ANSWER_S = 30.0
_END_S = 60.0
_READY_S, _AGAIN_S = 60.0, 1.0
_NOT_READY = "No available agent"  # Ray's answer while a new head's agent, which starts jobs, comes up
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray in the environment of a job's command
_AGENT = (
    "the agent that starts jobs does not come up: see dashboard_agent.log on the head; its port may be taken "
    "(ray start --dashboard-agent-listen-port)"
)

Write = Callable[[str], None]


def surrounding_job() -> dict[str, Any] | None:
    """The Ray job this process is the command of: {"runtime_env": .., "metadata": ..}; None outside a job."""
    text = os.environ.get(_JOB_CONFIG)
    return None if text is None else json.loads(text)


class JobServer:
    """A cluster that takes jobs.

    Args:
        address: URL of its dashboard, http://host:8265.

    Raises:
        ClusterError: nobody there, not a dashboard, or the token is missing or wrong.
    """

    def __init__(self, address: str) -> None:
        self.url = _dashboard_url(address)
        session, token = _open(self.url)
        #: whether the head runs on this machine; a port that is forwarded looks the same from the address
        self.here = any((Path(folder) / "ray" / session).is_dir() for folder in _temporary_folders())
        os.environ["RAY_API_SERVER_ADDRESS"] = self.url  # the client obeys it, or RAY_ADDRESS, before its argument
        from ray.job_submission import JobSubmissionClient

        for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env"):
            logging.getLogger(f"ray.{name}").setLevel(logging.ERROR)  # what is packed and uploaded is no news
        self.client: Any = JobSubmissionClient(self.url, headers=_headers(token))

    def submit(self, command: Sequence[str], working_dir: Path | None, name: str) -> str:
        """Start `command` as a job in a copy of `working_dir` (None: with what the cluster has installed), and return
        the job's id. A head that has just been started is given a minute to get ready.

        Raises:
            ClusterError: the cluster refuses it.
        """
        deadline = time.monotonic() + _READY_S
        while True:
            try:
                return self.client.submit_job(
                    entrypoint=shlex.join(command),
                    submission_id=f"{name}-{secrets.token_hex(4)}",
                    runtime_env={} if working_dir is None else {"working_dir": str(working_dir)},
                    metadata={"run": name},
                )
            except (RuntimeError, ValueError, OSError) as error:
                not_ready = _NOT_READY in str(error)
                if not not_ready or time.monotonic() > deadline:
                    reason = " ".join(str(error).split())[:300]
                    where, problem = f"job at {self.url}", f"it was not accepted ({reason})"
                    raise ClusterError(where, problem, _AGENT if not_ready else "see the dashboard") from error
            time.sleep(_AGAIN_S)

    def follow(self, job_id: str, write: Write, timeout_s: float | None = None) -> int:
        """Write the job's log as it comes, until the job ends; its exit code.

        Raises:
            DeadlineExceeded: it has not ended within `timeout_s` (None: however long it takes).
            ClusterError: the connection broke, or the job's command could not be started.
        """
        from aiohttp import ClientError

        try:
            asyncio.run(asyncio.wait_for(self._tail(job_id, write), timeout_s))
        except TimeoutError:
            hint = f"it goes on: {self.log_command(job_id)}"
            raise DeadlineExceeded(f"job {job_id} to end", timeout_s or 0.0, hint) from None
        except (RuntimeError, OSError, ClientError) as error:
            raise ClusterError(
                f"job {job_id}",
                f"the connection to its log broke ({error})",
                f"it goes on: {self.log_command(job_id)}",
            ) from error
        return self._exit_code(job_id)

    def log_command(self, job_id: str) -> str:
        """What to type to go on watching."""
        return f"ray job logs --follow {job_id} --address {self.url}"

    async def _tail(self, job_id: str, write: Write) -> None:
        async for text in self.client.tail_job_logs(job_id):
            write(text)

    def _exit_code(self, job_id: str) -> int:
        deadline = time.monotonic() + _END_S
        while not (job := self.client.get_job_info(job_id)).status.is_terminal():
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"the exit code of job {job_id}", _END_S, "its log has ended; see the dashboard")
            time.sleep(0.2)
        if job.driver_exit_code is not None:
            return int(job.driver_exit_code)
        if job.status == "STOPPED":
            return EXIT_STOPPED
        raise ClusterError(f"job {job_id}", f"{job.status}: {job.message}", "see its log and the dashboard")

    def ask(self, command: Sequence[str], working_dir: Path, name: str, timeout_s: float) -> tuple[int, str]:
        """Run a short command there, with the code of `working_dir` if it holds ours: its exit code and what it
        printed.
        """
        chunks: list[str] = []
        job_id = self.submit(command, working_dir if holds_our_code(working_dir) else None, name)
        code = self.follow(job_id, chunks.append, timeout_s)
        output = "".join(chunks)
        # Ray writes about the job's environment first, and then this line.
        before, announced, printed = output.partition(f"Running entrypoint for job {job_id}: {shlex.join(command)}\n")
        return code, printed if announced else before


def holds_our_code(folder: Path) -> bool:
    """Whether a job with this working directory runs the code in it, not what the cluster has installed."""
    return (folder / "cluster" / "cli.py").is_file()


def shared_folder(server: JobServer, folder: str, key: str, base: Path) -> str:
    """A folder as a job can use it. A relative one means nothing in a job, which runs in a copy that Ray throws away;
    only where the head is this machine do we know that the one in `base` is meant.

    Raises:
        UserError: relative, and the cluster is elsewhere.
    """
    path = Path(folder).expanduser()
    if path.is_absolute():
        return folder
    if server.here:
        return str(base.absolute() / path)
    raise UserError(
        f"{key} {folder}",
        "in a job a relative folder lies in Ray's copy of the working directory, which is thrown away",
        "give the absolute path of a folder that the whole cluster shares, such as /mnt/shared/runs",
    )


def _dashboard_url(address: str) -> str:
    """http(s)://host:port, once somebody listens there."""
    url = address.rstrip("/") if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        host, port = None, 0
    if parts.scheme not in ("http", "https") or not host:
        raise ClusterError(
            f"--address {address}", "this is not the URL of a dashboard", f"use for example {DEFAULT_ADDRESS}"
        )
    try:
        socket.create_connection((host, port), timeout=_PROBE_S).close()
    except OSError as error:
        raise ClusterError(
            f"--address {address}",
            f"nobody answers there ({error})",
            "give the dashboard of a running cluster (ray start --head prints its URL; on Kubernetes forward its port)",
        ) from None
    return url


def _open(url: str) -> tuple[str, str | None]:
    """Name of the cluster's session, and the token it asked for. One that it does not ask for it is not told.

    Raises:
        ClusterError: this is no dashboard, or it does not let us in.
    """
    token = None
    code, session = _session(url, None)
    if code in (401, 403):
        token = None if mode() == "disabled" else own_token()
        if token is not None:
            code, session = _session(url, token)
        if code in (401, 403):
            raise token_error(f"--address {url}", token)
    if session is None:
        raise ClusterError(
            f"--address {url}", "this is not a Ray dashboard", f"give its URL, by default {DEFAULT_ADDRESS}"
        )
    return session, token


def _session(url: str, token: str | None) -> tuple[int, str | None]:
    """HTTP status (0: none) and, from a Ray dashboard that lets us in, the name of its session."""
    request = urllib.request.Request(f"{url}/api/version", headers=_headers(token))
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
            return answer.status, str(json.loads(answer.read())["session_name"])
    except urllib.error.HTTPError as error:
        return error.code, None
    except (OSError, ValueError, KeyError, TypeError):
        return 0, None


def _headers(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def _temporary_folders() -> set[str]:
    return {os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), tempfile.gettempdir(), "/tmp"}
