"""Tickets are pure functions of the run seed and a counter."""

import pytest

from cluster.prompts import PromptSet
from cluster.tickets import TicketSource, make_ticket, unsafe_before

PROMPTS = PromptSet(safe=tuple(f"safe {i}" for i in range(7)), unsafe=tuple(f"unsafe {i}" for i in range(5)))


def source(seed: int = 3, fraction: float = 0.5) -> TicketSource:
    return TicketSource(seed, PROMPTS, fraction, 4)


def test_a_ticket_does_not_depend_on_the_tickets_asked_for_before() -> None:
    forwards = [source().ticket(i) for i in range(40)]
    backwards = [source().ticket(i) for i in reversed(range(40))][::-1]
    assert forwards == backwards
    assert forwards[17] == make_ticket(3, 17, PROMPTS, 0.5, 4)


@pytest.mark.parametrize(("fraction", "block"), [(0.5, 2), (0.25, 4), (0.3, 10), (0.1, 10), (1.0, 3), (0.0, 3)])
def test_every_aligned_block_holds_exactly_the_asked_share_of_unsafe_prompts(fraction: float, block: int) -> None:
    for start in range(0, 50 * block, block):
        classes = [source(fraction=fraction).ticket(i).prompt_class for i in range(start, start + block)]
        assert classes.count("unsafe") == round(fraction * block)


def test_shares_that_do_not_divide_are_met_in_the_long_run() -> None:
    assert unsafe_before(1000, 1 / 3) == 333


def test_a_class_is_gone_through_completely_before_a_prompt_repeats() -> None:
    safe = [t.prompt for t in (source().ticket(i) for i in range(200)) if t.prompt_class == "safe"]
    epochs = [safe[i : i + 7] for i in range(0, 70, 7)]
    assert all(set(epoch) == set(PROMPTS.safe) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5, "epochs are shuffled anew"


def test_seeds_are_distinct_fit_a_generator_and_depend_on_the_run_seed() -> None:
    tickets = [source().ticket(i) for i in range(100)]
    seeds = [seed for ticket in tickets for seed in (*ticket.seeds, ticket.step_seed)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert source(seed=4).ticket(0).seeds != tickets[0].seeds


def test_tickets_are_the_same_in_every_version_of_raysteer() -> None:
    ticket = source().ticket(11)
    assert (ticket.prompt_class, ticket.seeds[0] % 1000, ticket.step_seed % 1000) == FROZEN


FROZEN = ("unsafe", 964, 768)
