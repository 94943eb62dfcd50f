"""A run whose buffer or weight store dies ends and names it; its checkpoints are what the next one needs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from learner.checkpoint import latest_checkpoint
from raysteer.errors import ClusterError
from tests.ray.conftest import World

pytestmark = pytest.mark.timeout(500)


@pytest.mark.parametrize(("victim", "named"), [("weights", "weight store"), ("buffer", "RolloutBuffer")])
def test_a_dead_service_is_named_and_the_checkpoints_stay(
    ray_cluster: Any, world: World, monkeypatch: pytest.MonkeyPatch, victim: str, named: str
) -> None:
    import cluster.train as module

    started: list[Any] = []

    def start_services(*arguments: Any) -> Any:
        started.append(start(*arguments))
        return started[0]

    start = module.start_services
    world.plan_faults(hold_after=9)  # in the third batch, after the checkpoint of step 1
    recipe = world.recipe(f"dead-{victim}", run__checkpoint_every=1, learner__max_failures=0)

    def kill_once_a_score_is_held(snapshot: dict[str, Any]) -> None:
        if world.holding() is not None:
            ray_cluster.kill(getattr(started[0], victim))
            world.release()

    with monkeypatch.context() as patch:
        patch.setattr(module, "start_services", start_services)
        with pytest.raises(ClusterError, match=named):
            module.train(recipe, observe=kill_once_a_score_is_held)
    record = json.loads((recipe.run_dir / "ledger.json").read_text())
    assert record["status"] == "failed"
    assert record["steps"] >= 1
    checkpoint = latest_checkpoint(recipe.run_dir / "checkpoints", recipe.fingerprint())
    assert checkpoint is not None
    assert checkpoint.step == record["steps"]
    assert not (recipe.run_dir / "run.lock").exists()
