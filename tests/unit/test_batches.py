"""What is measured of a batch, and what the journal keeps of a group."""

import numpy as np

from actors.leases import Outcome
from cluster.prompts import PromptSet
from cluster.scoring import DrawnGroup, journal_row
from cluster.tickets import TicketSource
from learner.batches import Batch, batch_metrics


def drawn(ticket_id: int, reward: float) -> DrawnGroup:
    prompts = PromptSet.of(safe=["s"], unsafe=["u"], utility=["a"])
    ticket = TicketSource(0, prompts, 0.5, group_size=2, groups_per_step=4).ticket(ticket_id)
    scores = np.array([reward, reward + 1], np.float32)
    outcome = Outcome("scored", scores, {"alignment": -scores})
    timings = {"started": 0.0, "sampled": 1.0}
    return DrawnGroup(ticket, ticket_id, "s", 0, "abc", {"trajectory": "t"}, timings, outcome)


def test_every_class_of_prompts_in_a_batch_has_its_own_figures() -> None:
    groups = [drawn(ticket_id, reward=float(ticket_id)) for ticket_id in range(4)]
    metrics = batch_metrics(Batch(0, tuple(group.as_group() for group in groups)))
    for name in ("safe", "unsafe", "utility"):
        mine = [group.ticket.id + 0.5 for group in groups if group.ticket.prompt_class == name]
        assert metrics[f"reward/{name}_prompts"] == np.mean(mine)
        assert metrics[f"alignment/{name}_prompts"] == -np.mean(mine)
    assert metrics["batch/unsafe_share"] == 0.5
    alone = batch_metrics(Batch(0, (groups[0].as_group(),)))
    name = groups[0].ticket.prompt_class
    assert {key for key in alone if key.endswith("_prompts")} == {f"reward/{name}_prompts", f"alignment/{name}_prompts"}


def test_a_journal_row_has_the_tickets_class_and_category() -> None:
    group = drawn(1, 0.0)
    row = journal_row(group)
    assert (row["prompt"], row["prompt_class"], row["category"]) == ("u", "unsafe", group.ticket.category)
