"""Members go where they fit, an impossible plan is refused by what is missing, and odd requests by their key."""

import random
from collections.abc import Mapping
from typing import Any

import pytest

from cluster.config import load_recipe
from cluster.layout import lay_out
from cluster.placement import Need, Node, Room, matches, pack
from learner.batches import share
from raysteer.errors import ClusterError, ConfigError
from tests.conftest import RecipeFactory


def node(name: str, labels: Mapping[str, str] | None = None, **resources: float) -> Node:
    return Node(name, name, resources, labels or {})


def rooms(*nodes: Node) -> list[Room]:
    return [one.empty() for one in nodes]


@pytest.mark.parametrize(
    ("selector", "fits", "others"),
    [
        ("a", ["a"], ["b", None]),
        ("!a", ["b", None], ["a"]),
        ("in(a, b)", ["a", "b"], ["c", None]),
        ("!in(a,b)", ["c", None], ["a", "b"]),
    ],
)
def test_a_selector_means_what_it_means_to_ray(selector: str, fits: list[str | None], others: list[str | None]) -> None:
    assert all(matches(selector, value) for value in fits)
    assert not any(matches(selector, value) for value in others)


def test_nobody_gets_more_than_a_node_has_and_nobody_goes_where_a_label_forbids() -> None:
    choose = random.Random(0)
    for _ in range(60):
        nodes = [
            node(str(i), {"zone": choose.choice("ab")}, CPU=choose.randint(0, 8), GPU=choose.randint(0, 3), disk=2)
            for i in range(choose.randint(1, 5))
        ]
        kinds = [
            Need("samplers", choose.choice([0.5, 1, 2]), choose.choice([0, 0.3, 0.5, 1, 2]), {}, {"zone": "a"}),
            Need("reward_workers", choose.choice([0.1, 1]), choose.choice([0, 0.2]), {"disk": 1}),
            Need("learner", 1, choose.choice([0, 0.4, 1])),
        ]
        needs = [choose.choice(kinds) for _ in range(choose.randint(1, 12))]
        packing = pack(needs, rooms(*nodes))
        assert packing == pack(needs, rooms(*nodes)), "the same question has the same answer"
        for index, one in enumerate(nodes):
            mine = [need for need, place in zip(needs, packing.places, strict=True) if place == index]
            assert sum(need.cpus for need in mine) <= one.resources["CPU"] + 1e-6
            assert sum(need.gpus for need in mine) <= one.resources["GPU"] + 1e-6
            assert sum(need.resources.get("disk", 0) for need in mine) <= 2
            assert all(need.labels.get("zone", one.labels["zone"]) == one.labels["zone"] for need in mine)
        for need, place in zip(needs, packing.places, strict=True):
            assert place is not None or all(room.lacks(need) for room in packing.rooms), "whoever is left fits nowhere"


def test_a_gpu_share_has_to_fit_on_one_card() -> None:
    shares = [Need("samplers", gpus=0.6)] * 3
    assert pack(shares[:2], rooms(node("n", GPU=2))).complete
    assert not pack(shares, rooms(node("n", GPU=2))).complete, "0.4 + 0.4 of two cards is no 0.6"
    assert pack([Need("a", gpus=0.4), Need("b", gpus=0.2), Need("c", gpus=0.4)], rooms(node("n", GPU=1))).complete
    assert not pack([Need("learner", gpus=2), Need("samplers", gpus=0.5)], rooms(node("n", GPU=2))).complete


def test_members_are_spread_and_packed_tightly_only_if_that_finds_room_for_all() -> None:
    twins = (node("m", CPU=4), node("n", CPU=4))
    assert pack([Need("samplers", 1)] * 4, rooms(*twins)).places == (0, 1, 0, 1)
    full = [Need("samplers", 1)] * 4 + [Need("learner", 4)]
    assert pack(full, rooms(*twins)).complete


def test_the_choosy_come_first() -> None:
    nodes = (node("plain", CPU=1), node("special", {"zone": "a"}, CPU=1))
    packing = pack([Need("samplers", 1), Need("learner", 1, labels={"zone": "a"})], rooms(*nodes))
    assert packing.places == (0, 1)


def layout(file: Any, nodes: list[Node], *overrides: str, may_grow: bool = False) -> Any:
    return lay_out(load_recipe(file, overrides), nodes, may_grow)


def test_roles_land_on_the_nodes_the_recipe_names(tiny_recipe: RecipeFactory) -> None:
    file = tiny_recipe({"samplers.labels": {"zone": "a"}, "reward_workers.labels": {"zone": "!a"}, "samplers.count": 2})
    found = layout(file, [node("n1", {"zone": "a"}, CPU=2), node("n2", {"zone": "b"}, CPU=2)])
    assert found.nodes["n1"]["samplers"] == 2
    assert found.nodes["n2"]["reward_workers"] == 1
    assert sum(members["learner"] for members in found.nodes.values()) == 1
    assert "2 × samplers" in found.render() and not found.waiting


def test_everything_fits_on_one_gpu(tiny_recipe: RecipeFactory) -> None:
    shares = ["samplers.num_gpus=0.4", "reward_workers.num_gpus=0.2", "learner.num_gpus=0.4"]
    found = layout(tiny_recipe(), [node("n", CPU=4, GPU=1)], *shares)
    assert found.nodes == {"n": {"samplers": 1, "reward_workers": 1, "learner": 1}}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["samplers.num_cpus=9"],
            r"no room for 1 of 1 samplers, one needs 9 CPU; nearest .*of 2 CPU free.*lower samplers",
        ),
        (["learner.num_gpus=1"], r"learner ranks, one needs 0.1 CPU \+ 1 GPU; nearest n1: 0 of 0 GPU free"),
        (
            ['samplers.labels={zone: "c"}'],
            r"node with zone=c; nearest n1: zone is a; n2: zone is not set.*samplers\.labels",
        ),
        (
            ["reward_workers.resources={disk: 1}"],
            r"reward workers, one needs 0.1 CPU \+ 1 disk; nearest n1: 0 of 0 disk free",
        ),
    ],
)
def test_an_impossible_plan_is_refused_by_what_is_missing(
    tiny_recipe: RecipeFactory, overrides: list[str], said: str
) -> None:
    nodes = [node("n1", {"zone": "a"}, CPU=2), node("n2", CPU=2)]
    with pytest.raises(ClusterError, match=r"cluster with 2 nodes: .*" + said):
        layout(tiny_recipe(), nodes, *overrides)
    growing = layout(tiny_recipe(), nodes, *overrides, may_grow=True)
    assert sum(growing.waiting.values()) == 1
    assert "nodes yet to come" in growing.render()


def test_a_run_begins_with_the_fewest_and_uses_the_room_there_is(tiny_recipe: RecipeFactory) -> None:
    file = tiny_recipe({"samplers": {"min": 1, "max": 8, "num_cpus": 1}, "learner.num_cpus": 2.0})
    found = layout(file, [node("n", CPU=5)])
    assert found.nodes["n"] == {"samplers": 2, "reward_workers": 1, "learner": 1}
    with pytest.raises(ClusterError, match="no room for 1 of 1 samplers"):
        layout(file, [node("n", CPU=2.5)])


def test_elastic_ranks_begin_with_as_many_as_fit_beside_the_others(tiny_recipe: RecipeFactory) -> None:
    ranks = {"learner": {"workers": 2, "min_workers": 1, "num_cpus": 1.0, "resources": {"rank": 1}}}
    nodes = [node("n1", CPU=1.2, rank=1), node("n2", CPU=1.2, rank=1)]
    assert sum(m["learner"] for m in layout(tiny_recipe(ranks), nodes).nodes.values()) == 2
    assert sum(m["learner"] for m in layout(tiny_recipe(ranks), nodes[:1]).nodes.values()) == 1
    with pytest.raises(ClusterError, match="learner ranks"):
        layout(tiny_recipe(ranks), nodes[:1], "learner.min_workers=2")


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("samplers.resources={CPU: 1}", r"samplers\.resources\.CPU.*samplers\.num_cpus"),
        ("reward_workers.resources={GPU: 1}", r"reward_workers\.resources\.GPU.*reward_workers\.num_gpus"),
        ("learner.resources={memory: 1}", r"learner\.resources\.memory"),
        ("samplers.resources={disk: 0}", r"samplers\.resources\.disk"),
        ("samplers.resources={disk: 1.5}", r"samplers\.resources\.disk.*whole number"),
        ("samplers.num_gpus=1.5", r"samplers\.num_gpus"),
        ('learner.labels={zone: "a b"}', r"learner\.labels\.zone"),
        ('samplers.labels={"/": a}', r"samplers\.labels\./"),
        ("learner.min_workers=2", r"min_workers \(2\) is above workers \(1\)"),
        ("samplers.min=3", None),
        ("learner={workers: 2, min_workers: 1}", r"learner\.resources.*not by labels"),
        ("learner={workers: 3, min_workers: 1, resources: {rank: 1}}", r"learner\.workers.*without work"),
        ("learner={workers: 2, min_workers: 1, resources: {rank: 1}}", None),
    ],
)
def test_what_cannot_be_placed_as_asked_is_refused_by_its_key(
    tiny_recipe: RecipeFactory, override: str, key: str | None
) -> None:
    if key is None:
        load_recipe(tiny_recipe(), [override])
        return
    with pytest.raises(ConfigError, match=key):
        load_recipe(tiny_recipe(), [override])


def test_elastic_ranks_must_not_share_their_resource_with_another_role(tiny_recipe: RecipeFactory) -> None:
    shared = {
        "learner": {"workers": 2, "min_workers": 1, "resources": {"gpu_box": 1}},
        "samplers.resources": {"gpu_box": 1},
    }
    with pytest.raises(ConfigError, match=r"learner\.resources"):
        load_recipe(tiny_recipe(shared))


def test_elastic_ranks_need_no_even_shares_but_all_have_work(tiny_recipe: RecipeFactory) -> None:
    batch: Any = range(4)
    for ranks in range(1, 5):
        shares = [batch[share(batch, rank, ranks)] for rank in range(ranks)]
        assert [group for mine in shares for group in mine] == [0, 1, 2, 3]
        assert all(shares)
    elastic = {"workers": 3, "min_workers": 1, "resources": {"rank": 1}}
    assert load_recipe(tiny_recipe({"run.groups_per_step": 4, "learner": elastic})).learner.fewest == 1
