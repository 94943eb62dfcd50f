"""A cluster that a run starts for itself has no open doors: loopback only, and a token that is written nowhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(500)  # ten seconds on an idle machine


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What a private cluster shows of itself, and `files`: those of its session that hold the token."""
    with tempfile.TemporaryDirectory(prefix="rp") as folder:  # short: Ray puts unix sockets below it
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment |= {"RAY_TMPDIR": folder, "HOME": folder}
        command = [sys.executable, "-m", "tests.ray.private_cluster"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        assert len(files) > 5, "the session's logs are there to be searched"
        found["files"] = [str(path) for path in files if found["token"].encode() in path.read_bytes()]
        found["messages"] = done.stderr
        return found


def test_it_listens_on_loopback_only(seen: dict[str, Any]) -> None:
    assert set(seen["listening"]) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_it_asks_for_a_token(seen: dict[str, Any]) -> None:
    assert seen["mode"] == "token" and len(seen["token"]) == 64
    assert "it asks for a token, and there is none here" in seen["outsider"]


def test_its_token_is_in_no_file_no_command_line_and_no_message(seen: dict[str, Any]) -> None:
    assert seen["files"] == []
    for text in (*seen["commands"], seen["messages"], seen["outsider"]):
        assert seen["token"] not in text
