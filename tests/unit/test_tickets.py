"""Tickets are pure functions of the run seed and a counter."""

import hashlib
import pickle
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from cluster.prompts import PromptSet, PromptSource
from cluster.tickets import TicketSource, _order, chosen_before
from glyphs.prompts import FOLDER

PROMPTS = PromptSet.of(safe=(f"safe {i}" for i in range(7)), unsafe=(f"unsafe {i}" for i in range(5)))


def source(seed: int = 3, fraction: float = 0.5, prompts: PromptSet = PROMPTS) -> TicketSource:
    return TicketSource(seed, prompts, fraction, group_size=4, groups_per_step=6)


def mixed() -> PromptSet:
    """Two unsafe, two safe and one utility source of 3, 5, 4, 6 and 7 prompts, weights as below."""
    made = []
    kinds = [("unsafe", 3, 0.3), ("unsafe", 5, 0.1), ("safe", 4, 1.0), ("safe", 6, 2.0), ("utility", 7, 1.0)]
    for place, (kind, count, weight) in enumerate(kinds):
        (one,) = PromptSet.of(**{kind: [f"{kind} {place}-{i}" for i in range(count)]}).sources
        codes = np.arange(count, dtype=np.int32) % 2
        key = f"{kind}/{place}"
        made.append(PromptSource(key, one.prompt_class, weight, key, one.prompts, (None, "label"), codes))
    return PromptSet(tuple(made))


def test_a_ticket_does_not_depend_on_the_tickets_asked_for_before() -> None:
    for prompts in (PROMPTS, mixed()):
        forwards = [source(prompts=prompts).ticket(i) for i in range(60)]
        backwards = [source(prompts=prompts).ticket(i) for i in reversed(range(60))][::-1]
        assert forwards == backwards


@pytest.mark.parametrize(("fraction", "block"), [(0.5, 2), (0.25, 4), (0.3, 10), (0.1, 10), (1.0, 3), (0.0, 3)])
def test_every_aligned_block_holds_exactly_the_asked_share_of_unsafe_prompts(fraction: float, block: int) -> None:
    for start in range(0, 50 * block, block):
        classes = [source(fraction=fraction).ticket(i).prompt_class for i in range(start, start + block)]
        assert classes.count("unsafe") == round(fraction * block)


def test_shares_that_do_not_divide_are_met_in_the_long_run() -> None:
    assert chosen_before(1000, Fraction(1, 3)) == 333
    tickets = [source(fraction=1 / 3).ticket(i) for i in range(3000)]
    assert sum(ticket.prompt_class == "unsafe" for ticket in tickets) == 1000


def test_every_aligned_block_holds_exactly_the_share_of_every_source() -> None:
    # half unsafe in weights 3 : 1, the other half in weights 1 : 2 : 1, so 8 groups are 3, 1, 1, 2, 1
    tickets = source(prompts=mixed())
    for start in range(0, 400, 8):
        names = Counter(tickets.ticket(i).source for i in range(start, start + 8))
        assert names == {"unsafe/0": 3, "unsafe/1": 1, "safe/2": 1, "safe/3": 2, "utility/4": 1}


def test_any_number_of_tickets_is_shared_out_within_the_number_of_sources() -> None:
    shares = {"unsafe/0": 0.225, "unsafe/1": 0.075, "safe/2": 0.175, "safe/3": 0.35, "utility/4": 0.175}
    names: Counter[str] = Counter()
    tickets = source(fraction=0.3, prompts=mixed())
    for i in range(2000):
        names[tickets.ticket(i).source] += 1
        assert all(abs(names[name] - share * (i + 1)) < len(shares) for name, share in shares.items())
    assert names == {name: round(2000 * share) for name, share in shares.items()}


def test_a_source_is_gone_through_completely_before_a_prompt_repeats() -> None:
    safe = [t.prompt for t in (source().ticket(i) for i in range(200)) if t.prompt_class == "safe"]
    epochs = [safe[i : i + 7] for i in range(0, 70, 7)]
    assert all(set(epoch) == {f"safe {i}" for i in range(7)} for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5, "epochs are shuffled anew"
    tickets = list(map(source(prompts=mixed()).ticket, range(400)))
    for one in mixed().sources:
        drawn = [ticket.prompt for ticket in tickets if ticket.source == one.name]
        whole = len(drawn) // len(one) * len(one)
        assert whole >= 3 * len(one)
        for start in range(0, whole, len(one)):
            assert len(set(drawn[start : start + len(one)])) == len(one)


def test_the_order_of_an_epoch_is_a_permutation_and_each_source_and_epoch_has_its_own() -> None:
    orders = set()
    for count in [*range(1, 70), 1000, 65_537]:
        for key, epoch in (("safe", 0), ("safe", 1), ("safe/1", 0)):
            order = _order(11, key, epoch, count)
            assert np.array_equal(np.sort(order), np.arange(count))
            orders.add((count, order.tobytes()))
    assert len([1 for count, _ in orders if count > 20]) == 3 * 51


def test_a_ticket_carries_step_class_source_and_category() -> None:
    tickets = list(map(source(prompts=mixed()).ticket, range(48)))
    assert [ticket.step for ticket in tickets] == [i // 6 for i in range(48)]
    for ticket in tickets:
        place, index = ticket.prompt.split(" ")[1].split("-")
        assert ticket.source == f"{ticket.prompt_class}/{place}"
        assert ticket.category == (None, "label")[int(index) % 2]
    assert {ticket.prompt_class for ticket in tickets} == {"safe", "unsafe", "utility"}


def test_a_ticket_source_travels_as_buffers_not_as_texts() -> None:
    prompts = PromptSet.of(safe=(f"a prompt of some length, number {i}" for i in range(50_000)), unsafe=["x"])
    sent = source(prompts=prompts)
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(sent, protocol=5, buffer_callback=buffers.append)
    assert len(stream) < 10_000
    received = pickle.loads(stream, buffers=buffers)
    assert [received.ticket(i) for i in range(20)] == [sent.ticket(i) for i in range(20)]
    assert len(pickle.dumps(sent.ticket(0))) < 1000


def test_seeds_are_distinct_fit_a_generator_and_depend_on_the_run_seed() -> None:
    tickets = [source().ticket(i) for i in range(100)]
    seeds = [seed for ticket in tickets for seed in (*ticket.seeds, ticket.step_seed)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert source(seed=4).ticket(0).seeds != tickets[0].seeds


def test_tickets_are_the_same_in_every_version_of_raysteer() -> None:
    ticket = source().ticket(11)
    assert (ticket.prompt_class, ticket.seeds[0] % 1000, ticket.step_seed % 1000) == FROZEN
    drawn = " ".join(source().ticket(i).prompt.replace("unsafe ", "u").replace("safe ", "s") for i in range(16))
    assert drawn == FROZEN_PROMPTS


FROZEN = ("unsafe", 964, 768)
FROZEN_PROMPTS = "s0 u3 s4 u0 s1 u1 s6 u2 s5 u4 s3 u3 s2 u1 s6 u4"


def test_the_glyph_world_is_drawn_in_the_order_its_published_figures_were_measured_with() -> None:
    lists = {
        name: (FOLDER / f"train-{name}.txt").read_text(encoding="utf-8").splitlines() for name in ("safe", "unsafe")
    }
    tickets = source(seed=0, prompts=PromptSet.of(**lists))
    drawn = [tickets.ticket(i).prompt for i in range(720)]
    assert hashlib.sha256("\n".join(drawn).encode()).hexdigest()[:16] == FROZEN_GLYPHS


FROZEN_GLYPHS = "7d685ff57dd8c8ed"
