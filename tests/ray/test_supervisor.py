"""The supervisor notices every death, gives the replacement a new name, and gives up by naming the cause.

It starts nobody where there is no room, keeps the learner's room free, and makes room when the learner waits.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.placement import Need
from cluster.services import LearnerRoom, start_actor
from cluster.supervisor import Role, Supervisor
from raysteer.errors import ClusterError
from tests.ray.conftest import World

pytestmark = pytest.mark.timeout(200)


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


def role(fates: dict[str, str], folder: Path, lost: list[str], cpus: float = 0.1, most: int = 1) -> Role:
    need = Need("members", cpus)
    return Role(
        "member",
        need,
        1,
        most,
        create=lambda name, node: start_actor(
            Worker, name, fates.get(name, "lasts"), str(folder), need=need, node=node
        ),
        run=lambda name, handle: handle.run.remote(),
        stop=lambda handle: (folder / "stop").touch(),
        on_lost=lost.append,
        max_restarts=1,
        start_timeout_s=100.0,
    )


def poll_until(supervisor: Supervisor, at_work: list[str]) -> None:
    """Until exactly these members are at work; the test's own deadline ends it."""
    while [member.id for member in supervisor.members if member.at_work] != at_work:
        supervisor.poll(1.0)


@pytest.mark.parametrize("fate", ["raises", "killed", "constructor"])
def test_a_dead_member_is_reported_and_replaced_under_a_new_name(ray_cluster: Any, tmp_path: Path, fate: str) -> None:
    lost: list[str] = []
    supervisor = Supervisor([role({"member-0": fate}, tmp_path, lost)])
    supervisor.start()
    poll_until(supervisor, ["member-0.1"])
    assert lost == ["member-0"]
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
    poll_until(supervisor, ["member-0.1"])
    assert lost == ["member-0"]
    assert supervisor.restarts == {"member": 1}
    supervisor.stop(30.0)


def test_members_that_find_no_room_for_too_long_end_the_run_with_what_they_need(
    ray_cluster: Any, tmp_path: Path
) -> None:
    from dataclasses import replace

    hopeless = replace(role({}, tmp_path, [], cpus=1000.0), start_timeout_s=0.01)
    supervisor = Supervisor([hopeless])
    supervisor.start()
    with pytest.raises(ClusterError, match=r"members: only 0 of the 1 .*one needs 1000 CPU.*members\.start_timeout_s"):
        for _ in range(3):
            supervisor.poll(0.1)


def test_the_learner_keeps_its_room_and_gets_that_of_a_member_beyond_the_fewest_when_it_waits(
    ray_cluster: Any, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.util.placement_group import placement_group, remove_placement_group

    monkeypatch.setattr("cluster.supervisor.LEARNER_WAITS_S", 0.0)
    cpus = ray_cluster.cluster_resources()["CPU"]
    bundle = {"CPU": cpus / 2}
    learner = LearnerRoom(world.recipe("room", learner__num_cpus=cpus / 2))
    lost: list[str] = []
    supervisor = Supervisor([role({}, tmp_path, lost, cpus / 4, most=4)], learner)
    supervisor.start()
    poll_until(supervisor, ["member-0", "member-1"])
    assert learner.look() == ([], False)
    supervisor.poll(0.1)
    assert len(supervisor.members) == 2, "half of the cluster is the learner's, who has not come yet"

    ranks = placement_group([bundle])
    assert ranks.wait(60)
    held, waits = learner.look()
    assert (len(held), waits) == (1, False)
    remove_placement_group(ranks)
    stranger = start_actor(Worker, "stranger", "lasts", str(tmp_path), need=Need("others", cpus / 4))
    ray_cluster.get(stranger.__ray_ready__.remote(), timeout=60)
    ranks = placement_group([bundle])
    poll_until(supervisor, ["member-0"])
    assert lost == ["member-1"]
    assert ranks.wait(60), "the learner has its room"
    supervisor.stop(30.0)
    remove_placement_group(ranks)
    ray_cluster.kill(stranger)
