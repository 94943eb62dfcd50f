"""Offline runs, as far as they need no cluster: what a stop request reaches, which dataset is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.offline import pass_on_stop
from cluster.storage import RunFolder


def test_a_stop_asked_of_a_run_in_rounds_reaches_the_generation_under_way(tmp_path: Path) -> None:
    run, generation = RunFolder(tmp_path / "run").create(), RunFolder(tmp_path / "run" / "rounds" / "one").create()
    seen: list[dict[str, Any]] = []
    watch = pass_on_stop(run, generation, [seen.append])
    watch({"version": 1})
    assert not generation.stop_request.exists()
    run.stop_request.touch()
    watch({"version": 2})
    assert generation.stop_request.exists()
    assert [snapshot["version"] for snapshot in seen] == [1, 2]
