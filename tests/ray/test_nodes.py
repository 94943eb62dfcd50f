"""Several nodes: everybody lands where the recipe says, nodes come and go, and what is learned stays the same.

A cluster of several nodes on this machine lives in a process of its own (`python -m tests.ray.test_nodes`), apart from
the cluster of the other tests. It runs the scenarios one after the other and writes down what the tests look at, and
how long the loss of a node took to get over (`benchmarks/faults.py` wants to know). Drawing nodes say that they have a
GPU, which sampler and reward worker share.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ray.conftest import World

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)

# A lost node is noticed within seconds, but a busy machine is no lost node.
_SYSTEM = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 4,
}
_DRAWING: dict[str, Any] = {
    "num_cpus": 1,
    "num_gpus": 1,
    "resources": {"draw": 1, "score": 1},
    "labels": {"pool": "drawing"},
}
_LEARNING: dict[str, Any] = {"num_cpus": 1, "resources": {"rank": 1}, "labels": {"pool": "learning"}}
_MEMBERS: dict[str, Any] = {
    "samplers": {
        "num_cpus": 0.1,
        "num_gpus": 0.5,
        "device": "cpu",
        "resources": {"draw": 1},
        "labels": {"pool": "drawing"},
    },
    "reward_workers": {
        "num_cpus": 0.1,
        "num_gpus": 0.25,
        "device": "cpu",
        "resources": {"score": 1},
        "labels": {"pool": "!learning"},
    },
}


# ---- the process that has the cluster -------------------------------------------------------------------------------


class Nodes:
    """A head without work, the nodes of the scenarios, and the supervisor of the run that is under way."""

    def __init__(self, world: World) -> None:
        from ray.cluster_utils import Cluster

        import cluster.train as module
        from cluster.supervisor import Supervisor

        self.world, self.supervisor = world, Supervisor([])
        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": _SYSTEM}
        )
        nodes = self

        class Seen(Supervisor):
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **options)
                nodes.supervisor = self

        module.Supervisor = Seen  # type: ignore[misc]

    def train(self, recipe: str, observe: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        """Run a recipe on this cluster; what became of it, as JSON can hold it."""
        from cluster.config import load_recipe
        from cluster.train import train
        from raysteer.errors import ClusterError

        try:
            result = train(load_recipe(recipe, [f"cluster.address={self.cluster.address}"]), observe)
        except ClusterError as error:
            return {"refused": str(error)}
        return {"status": result.status, "ledger": result.ledger, "restarts": result.restarts}

    def places(self) -> dict[str, str]:
        """Pool of every member at work, and of every learner rank."""
        import ray
        from ray.util import placement_group_table

        pools = {node["NodeID"]: node["Labels"].get("pool", "head") for node in ray.nodes()}
        found = {member.id: pools[str(member.node)] for member in self.supervisor.members if member.at_work}
        groups = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
        ranks = [node for group in groups for node in group["bundles_to_node_id"].values()]
        return found | {f"rank-{index}": pools[node] for index, node in enumerate(ranks)}


class Recovery:
    """Seconds from the loss of a node to the next finished learner step."""

    def __init__(self) -> None:
        self.struck: float | None = None
        self.seconds: float | None = None

    def strike(self) -> None:
        self.struck = time.monotonic()

    def watch(self, snapshot: dict[str, Any]) -> None:
        if snapshot["reports"] and self.struck is not None and self.seconds is None:
            self.seconds = time.monotonic() - self.struck


def come_and_go(nodes: Nodes, recipe: str) -> dict[str, Any]:
    """While a score of the second batch is held back a node joins, and the one that drew everything goes."""
    first, seen, recovery = nodes.cluster.add_node(**_DRAWING), {}, Recovery()

    def observe(snapshot: dict[str, Any]) -> None:
        recovery.watch(snapshot)
        if "removed" in seen or nodes.world.holding() is None:
            return
        if "joined" not in seen:
            seen["begun"] = nodes.places()
            seen["joined"] = nodes.cluster.add_node(**_DRAWING).node_id
        elif len(nodes.places()) == 5 and "sampler-1" in snapshot["samplers"]:
            seen["grown"] = nodes.places()
            seen["version"] = snapshot["version"]
            recovery.strike()
            nodes.cluster.remove_node(first, allow_graceful=False)
            nodes.world.release()
            seen["removed"] = first.node_id

    nodes.world.plan_faults(hold_after=5)
    return nodes.train(recipe, observe) | seen | {"recovered_s": recovery.seconds}


def fewer_ranks(nodes: Nodes, recipe: str, second: Any) -> dict[str, Any]:
    """While a score of the third batch is held back `second`, the node of one of two learner ranks, goes."""
    seen: dict[str, Any] = {}
    recovery = Recovery()

    def observe(snapshot: dict[str, Any]) -> None:
        recovery.watch(snapshot)
        if "ranks" not in seen and nodes.world.holding() is not None and snapshot["version"] == 2:
            seen["ranks"] = len(snapshot["learners"])
            recovery.strike()
            nodes.cluster.remove_node(second, allow_graceful=False)
            nodes.world.release()
        seen["ranks_at_the_end"] = len(snapshot["learners"])

    nodes.world.plan_faults(hold_after=9)
    return nodes.train(recipe, observe) | seen | {"recovered_s": recovery.seconds}


def main(folder: str, report: str, recipes: dict[str, str]) -> None:
    nodes = Nodes(World(Path(folder), None))
    try:
        nodes.cluster.add_node(**_LEARNING)
        found = {"impossible": nodes.train(recipes["impossible"])}
        # Long before it is needed: Ray Train sizes an elastic group by a view of the cluster that is seconds old.
        second = nodes.cluster.add_node(**_LEARNING)
        found["come_and_go"] = come_and_go(nodes, recipes["come_and_go"])
        found["fewer_ranks"] = fewer_ranks(nodes, recipes["fewer_ranks"], second)
        Path(report).write_text(json.dumps(found), encoding="utf-8")
    finally:
        nodes.cluster.shutdown()


# ---- the tests ------------------------------------------------------------------------------------------------------


def play(world: World, folder: Path) -> dict[str, Any]:
    """What became of every scenario; its report is written into `folder`. RAY_TMPDIR is short: sockets need it."""
    names: dict[str, dict[str, Any]] = {
        "impossible": {"samplers": _MEMBERS["samplers"] | {"num_gpus": 0.0, "labels": {"pool": "nowhere"}}},
        "come_and_go": {section: sizes | {"min": 1, "max": 2} for section, sizes in _MEMBERS.items()}
        | {"learner__labels": {"pool": "learning"}},
        "fewer_ranks": _MEMBERS
        | {"learner__workers": 2, "learner__min_workers": 1, "learner__resources": {"rank": 1}}
        | {"run__checkpoint_every": 1},
    }
    recipes = {name: str(world.recipe_file(f"nodes-{name}", **changes)) for name, changes in names.items()}
    report = folder / "report.json"
    environment = os.environ | {
        "RAY_TMPDIR": os.environ["RAY_TMPDIR"] + "n",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10",
    }
    command = [sys.executable, "-m", "tests.ray.test_nodes", str(world.folder), str(report), json.dumps(recipes)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(report.read_text(encoding="utf-8")) | {"printed": done.stdout}


@pytest.fixture(scope="module")
def scenarios(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return play(world, tmp_path_factory.mktemp("nodes"))


def adapters(found: Path, expected: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    from diffusion.adapters import load_adapter_file

    ours, theirs = load_adapter_file(found), load_adapter_file(expected)
    assert ours.keys() == theirs.keys()
    return [(ours[name], theirs[name]) for name in ours]


def test_a_plan_that_no_node_can_hold_is_refused_by_what_is_missing(scenarios: dict[str, Any], world: World) -> None:
    refused = scenarios["impossible"]["refused"]
    assert "no room for 1 of 1 samplers, one needs 0.1 CPU + 1 draw on a node with pool=nowhere" in refused
    assert "pool is learning" in refused
    assert not list((world.folder / "runs" / "nodes-impossible").glob("journal/*")), "nothing was started"


def test_roles_land_on_the_nodes_that_the_recipe_names(scenarios: dict[str, Any]) -> None:
    begun = scenarios["come_and_go"]["begun"]
    assert begun == {"sampler-0": "drawing", "reward_worker-0": "drawing", "rank-0": "learning"}
    assert "1 × samplers" in scenarios["printed"], "who goes where is printed first"


def test_a_newcomer_draws_its_first_group_under_the_newest_adapter(scenarios: dict[str, Any], world: World) -> None:
    from cluster.journal import read_journal

    found = scenarios["come_and_go"]
    assert found["grown"].keys() - found["begun"].keys() == {"sampler-1", "reward_worker-1"}
    rows = read_journal(world.folder / "runs" / "nodes-come_and_go" / "journal").to_pylist()
    first = min((row for row in rows if row["sampler"] == "sampler-1"), key=lambda row: row["scored_at"])
    assert first["version"] == found["version"] == 1
    assert len({row["checksum"] for row in rows if row["version"] == 1}) == 1


def test_a_node_that_goes_changes_nothing_that_is_learned(
    scenarios: dict[str, Any], undisturbed: Any, world: World
) -> None:
    found = scenarios["come_and_go"]
    assert found["status"] == "finished"
    assert found["ledger"]["events"]["sampler_lost"] >= 1
    assert found["ledger"]["committed"] == 16 and not found["ledger"]["dropped"]
    assert found["restarts"] == {"sampler": 0, "reward_worker": 0}, "there was no room to start them again"
    for ours, theirs in adapters(world.folder / "runs" / "nodes-come_and_go" / "adapter", undisturbed.adapter_dir):
        np.testing.assert_array_equal(ours, theirs)


def test_an_elastic_learner_goes_on_with_the_rank_that_is_left(
    scenarios: dict[str, Any], undisturbed: Any, world: World
) -> None:
    found = scenarios["fewer_ranks"]
    assert (found["status"], found["ranks"], found["ranks_at_the_end"]) == ("finished", 2, 1)
    assert found["ledger"]["events"]["rewinds"] >= 1
    assert found["ledger"]["committed"] == 16 and not found["ledger"]["dropped"]
    for ours, theirs in adapters(world.folder / "runs" / "nodes-fewer_ranks" / "adapter", undisturbed.adapter_dir):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
