"""The supervisor notices every death, gives the replacement a new name, and gives up by naming the cause."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.services import start_actor
from cluster.supervisor import Role, Supervisor
from raysteer.errors import ClusterError

pytestmark = pytest.mark.timeout(120)


class Worker:
    """Dies in its constructor, raises in `run`, is killed in `run`, or lasts until the file `stop` is there."""

    def __init__(self, name: str, fate: str, folder: str) -> None:
        if fate == "constructor":
            raise RuntimeError("no such model")
        self.fate, self.folder = fate, Path(folder)

    def run(self) -> str:
        if self.fate == "raises":
            raise ValueError("cannot draw")
        if self.fate == "killed":
            os.kill(os.getpid(), 9)
        while not (self.folder / "stop").exists():
            time.sleep(0.02)
        return "done"


def role(fates: dict[str, str], folder: Path, lost: list[str], max_restarts: int = 1) -> Role:
    return Role(
        "member",
        1,
        create=lambda name: start_actor(Worker, name, fates.get(name, "lasts"), str(folder)),
        run=lambda name, handle: handle.run.remote(),
        stop=lambda handle: (folder / "stop").touch(),
        on_lost=lost.append,
        max_restarts=max_restarts,
    )


@pytest.mark.parametrize("fate", ["raises", "killed", "constructor"])
def test_a_dead_member_is_reported_and_replaced_under_a_new_name(ray_cluster: Any, tmp_path: Path, fate: str) -> None:
    lost: list[str] = []
    supervisor = Supervisor([role({"member-0": fate}, tmp_path, lost)])
    supervisor.start()
    while not lost:
        supervisor.poll(10.0)
    assert lost == ["member-0"]
    assert [member.id for member in supervisor.members] == ["member-0.1"]
    assert supervisor.restarts == {"member": 1}
    assert supervisor.stop(30.0) == [], "the replacement ended when it was asked to"


def test_a_member_that_dies_too_often_ends_the_run_with_the_cause(ray_cluster: Any, tmp_path: Path) -> None:
    fates = {"member-0": "constructor", "member-0.1": "constructor"}
    supervisor = Supervisor([role(fates, tmp_path, [])])
    supervisor.start()
    with pytest.raises(
        ClusterError, match=r"member-0: died 2 times.*RuntimeError: no such model.*members\.max_restarts"
    ):
        while True:
            supervisor.poll(10.0)


def test_a_member_that_does_not_answer_is_ended_and_replaced(ray_cluster: Any, tmp_path: Path) -> None:
    lost: list[str] = []
    supervisor = Supervisor([role({}, tmp_path, lost)])
    supervisor.start()
    supervisor.kill("member-0", "silent")
    while not lost:
        supervisor.poll(10.0)
    assert supervisor.restarts == {"member": 1}
    supervisor.stop(30.0)
