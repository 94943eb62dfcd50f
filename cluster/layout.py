"""Layout: a recipe on the nodes of a cluster, and what it may ask of them.

Samplers and reward workers are pinned to the node that is chosen for them, so that what is printed is what happens.
Learner ranks are placed by Ray Train: room is kept free for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.placement import LABEL_KEY, SELECTOR, Need, Node, pack, pack_run, shortfall
from raysteer.errors import ClusterError, ConfigError

if TYPE_CHECKING:
    from cluster.config import Recipe

_OWN_KEYS = {"CPU": "num_cpus", "GPU": "num_gpus"}


@dataclass(frozen=True)
class Layout:
    """Who goes where when a run begins: by node, members by section; `waiting`: those who find no node yet.

    `evaluator`: id of the node of the evaluator beside training, None if there is none, or no node for it yet.
    """

    nodes: Mapping[str, Mapping[str, int]]
    waiting: Mapping[str, int]
    evaluator: str | None = None

    def render(self) -> str:
        """One line for each node that gets somebody, and one for those who wait."""
        lines = [f"{name:<28} {_counted(members)}" for name, members in self.nodes.items() if members]
        if self.waiting:
            lines.append(f"{'nodes yet to come':<28} {_counted(self.waiting)} (cluster.autoscaling)")
        return "\n".join(f"{'' if index else 'nodes':<15}{line}" for index, line in enumerate(lines))


def need_of(recipe: Recipe, section: str) -> Need:
    """What one member of a section takes."""
    role = getattr(recipe, section)
    return Need(section, role.num_cpus, role.num_gpus, role.resources, role.labels)


def evaluator_need(recipe: Recipe) -> Need | None:
    """What the evaluator beside training takes: as much as a sampler. None: there is none."""
    if recipe.evaluation.every is None:
        return None
    return replace(need_of(recipe, "samplers"), section="evaluator")


def lay_out(recipe: Recipe, nodes: Sequence[Node], may_grow: bool) -> Layout:
    """Place what a run begins with, and as many more as there is room for. `may_grow`: nodes may join on demand.

    Raises:
        ClusterError: there is no room for the fewest of every role and the cluster cannot grow; says what is missing.
    """
    sections = {"samplers": recipe.samplers, "reward_workers": recipe.reward_workers}
    evaluator = evaluator_need(recipe)
    fewest = [need for name, role in sections.items() for need in [need_of(recipe, name)] * role.fewest]
    fewest += [] if evaluator is None else [evaluator]
    extras = [need for name, role in sections.items() for need in [need_of(recipe, name)] * (role.most - role.fewest)]
    learner, rank = recipe.learner, need_of(recipe, "learner")
    ranks, packing = pack_run(rank, learner.workers, learner.fewest, fewest, [node.empty() for node in nodes])
    needs = [rank] * ranks + fewest
    if not packing.complete and not may_grow:
        section, missing = shortfall(needs, packing)
        where = nodes[0].name if len(nodes) == 1 else f"cluster with {len(nodes)} nodes"
        number = "workers" if section == "learner" else "count"
        lower = f"lower {section}.{number} or what each takes, change {section}.labels"
        if section == "evaluator":  # it takes what a sampler does
            lower = "lower samplers.count or what each takes, or set evaluation.every to null"
        remedy = f"{lower}, or give the cluster such a node"
        raise ClusterError(where, missing, f"{remedy} (cluster.autoscaling: true if it grows on demand)")
    more = pack(extras, packing.rooms)
    held: dict[str, Counter[str]] = {node.name: Counter() for node in nodes}
    waiting: Counter[str] = Counter()
    for need, place in zip(needs + extras, packing.places + more.places, strict=True):
        if place is not None:
            held[nodes[place].name][need.section] += 1
        elif may_grow:
            waiting[need.section] += 1
    place = None if evaluator is None else packing.places[-1]
    return Layout(held, waiting, None if place is None else nodes[place].id)


def _counted(members: Mapping[str, int]) -> str:
    return ", ".join(f"{count} × {section}" for section, count in members.items())


def check_needs(recipe: Recipe) -> None:
    """Refuse resources and labels that Ray does not know or reads otherwise, and ranks Ray Train would miscount.

    Raises:
        ConfigError: naming the key.
    """
    for section in ("samplers", "reward_workers", "learner"):
        role = getattr(recipe, section)
        for name, amount in role.resources.items():
            key = f"{section}.resources.{name}"
            if name in _OWN_KEYS:
                raise ConfigError(key, amount, f"write it as {section}.{_OWN_KEYS[name]}")
            if name in ("memory", "object_store_memory"):
                raise ConfigError(key, amount, "members are not placed by memory: take it out")
            if amount <= 0 or (amount > 1 and amount != int(amount)):
                raise ConfigError(key, amount, "it must be a share of 1 above 0, or a whole number")
        if role.num_gpus > 1 and role.num_gpus != int(role.num_gpus):
            raise ConfigError(f"{section}.num_gpus", role.num_gpus, "it must be a share of one GPU or a whole number")
        for label, selector in role.labels.items():
            if not LABEL_KEY.fullmatch(label) or not SELECTOR.fullmatch(selector):
                raise ConfigError(
                    f"{section}.labels.{label}", selector, "it must be a label of nodes: a, !a, in(a, b) or !in(a, b)"
                )
    learner = recipe.learner
    others = recipe.samplers.resources.keys() | recipe.reward_workers.resources.keys()
    if learner.fewest < learner.workers and not learner.resources.keys() - others:
        raise ConfigError(
            "learner.resources",
            learner.resources,
            "with learner.min_workers they must name a resource that only learner nodes have, one for each rank that "
            "fits there (ray start --resources), such as {learner: 1}: Ray Train counts elastic ranks by resources, "
            "not by labels",
        )
