"""Data dies with the process that put it; whoever fetches it is told which groups are gone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cluster.services import start_actor
from learner.batches import Group, fetch_trajectories

pytestmark = pytest.mark.timeout(120)


class Owner:
    """Puts one array of its own."""

    def put(self, value: float) -> list[Any]:
        import ray

        return [ray.put(np.full(300_000, value))]  # large enough to live in the object store, not in the reply


def group(ticket_id: int, trajectory: list[Any]) -> Group:
    return Group(ticket_id, "p", "safe", 0, "c", "s", np.zeros(2, np.float32), {}, trajectory, {})


def test_the_groups_of_a_dead_owner_are_named_and_the_others_arrive(ray_cluster: Any) -> None:
    alive, dead = start_actor(Owner), start_actor(Owner)
    groups = [
        group(number, ray_cluster.get(owner.put.remote(float(number))))
        for number, owner in enumerate((alive, dead, alive))
    ]
    found, lost = fetch_trajectories(groups, 30.0)
    assert (sorted(found), lost) == ([0, 1, 2], [])
    found = {}
    ray_cluster.kill(dead)
    while not lost:  # the store keeps the data until it has noticed the death, and while somebody reads it
        found = {}
        found, lost = fetch_trajectories(groups, 30.0)
    assert (sorted(found), lost) == ([0, 2], [1])
    assert float(np.asarray(found[2])[0]) == 2.0
