"""Supervisor: starts the members of a role where there is room, notices when one dies, replaces it, and ends them all.

A member is an actor with a `run` call that lasts as long as the member does: its future failing is how a death is
noticed, at once and without polling the member. A replacement has a new id, so that what the dead one left behind can
be told apart.

Who is started when: the fewest members that a run needs first, then more of them, up to the most it can use. Room for
the learner ranks is kept free, or they would wait for ever after a restart; if they wait all the same, a member beyond
the fewest is ended for them. Members that were lost with their node are started again when there is room, and have
done nothing wrong.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.placement import Need, Room, free_rooms, live_nodes, pack, pack_run, shortfall
from raysteer.errors import ClusterError

LEARNER_WAITS_S = 5.0  # a placement group that finds room does so sooner

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Role:
    """One kind of member.

    Attributes:
        name: "sampler"; members are called sampler-0, its replacement sampler-0.1 and so on.
        need: what each takes. fewest, most: how many a run needs and can use.
        create: (id, node id or None: where Ray finds room) -> actor handle (at once; loading happens in the actor).
        run: (id, handle) -> reference that resolves when the member is done and fails when it dies.
        stop: handle -> None, asks the member to end (it may also learn that elsewhere).
        on_lost: id -> None, called when one is gone, before a replacement is started.
        max_restarts: replacements of one slot that died by itself.
        start_timeout_s: longest time with fewer than `fewest` members at work.
    """

    name: str
    need: Need
    fewest: int
    most: int
    create: Callable[[str, str | None], Any]
    run: Callable[[str, Any], Any]
    stop: Callable[[Any], None]
    on_lost: Callable[[str], None]
    max_restarts: int
    start_timeout_s: float


class Ranks(Protocol):
    """The learner as far as it competes for room (see cluster.services.LearnerRoom)."""

    need: Need
    fewest: int
    most: int
    start_timeout_s: float

    def look(self) -> tuple[list[str], bool]:
        """Node of every rank that has its room, and whether others wait for it."""


@dataclass(eq=False)
class Member:
    """`node`: its id, None until an unpinned member has been placed. `located` resolves to it once it is loaded.
    `ended_for`: why we ended it ourselves.
    """

    slot: Slot
    id: str
    handle: Any
    located: Any
    running: Any
    node: str | None
    at_work: bool = False
    ended_for: str = ""


@dataclass(eq=False)
class Slot:
    """The place of one member of a role, and of its replacements. `died_on`: node of each that died by itself."""

    role: Role
    index: int
    generation: int = 0
    died_on: list[str | None] = field(default_factory=list)
    member: Member | None = None


class Supervisor:
    """Keeps the members of all roles alive. `restarts` counts replacements by role.

    `learner`: whose room is kept free. `may_grow`: on a cluster that grows on demand whoever finds no room is created
    all the same: waiting in Ray's queue is what brings nodes. `others`: node and need of actors of this run that are
    looked after elsewhere, whose room is not free.
    """

    def __init__(
        self,
        roles: Sequence[Role],
        learner: Ranks | None = None,
        may_grow: bool = False,
        others: Callable[[], Sequence[tuple[str | None, Need]]] = tuple,
    ) -> None:
        self.roles, self.learner, self.may_grow, self.others = roles, learner, may_grow, others
        self.slots = [Slot(role, index) for role in roles for index in range(role.most)]
        self.restarts: dict[str, int] = {role.name: 0 for role in roles}
        self._short_since: dict[str, float] = {}
        self._no_room = ""
        self._learner_waits_since: float | None = None

    @property
    def members(self) -> list[Member]:
        return [slot.member for slot in self.slots if slot.member is not None]

    def start(self) -> None:
        """Start whoever there is room for."""
        self._fill(*self._ranks())

    def poll(self, timeout_s: float) -> None:
        """Wait for at most `timeout_s` for somebody to come or go; replace the dead, use new room, make room.

        Raises:
            ClusterError: one has died too often, or too few members or ranks are there for too long.
        """
        import ray

        waited_for = {member.running: member for member in self.members}
        waited_for |= {member.located: member for member in self.members if not member.at_work}
        if not waited_for:
            time.sleep(timeout_s)
        for reference in ray.wait(list(waited_for), num_returns=1, timeout=timeout_s)[0] if waited_for else ():
            member = waited_for[reference]
            try:
                result = ray.get(reference)
            except ray.exceptions.RayError as error:
                self._lost(member, error)
                continue
            if reference == member.located:
                member.node, member.at_work = result, True
            else:
                ray.kill(member.handle)  # it was told to end, and has
                self.slots.remove(member.slot)
        held, waits = self._ranks()
        self._fill(held, waits)
        self._make_room(waits)
        self._check_patience(held)

    def kill(self, member_id: str, reason: str) -> None:
        """End a member that is there but does not answer; `poll` replaces it."""
        import ray

        for member in self.members:
            if member.id == member_id:
                logger.warning("%s is ended: %s", member_id, reason)
                member.ended_for = reason
                ray.kill(member.handle)

    def stop(self, timeout_s: float) -> list[str]:
        """Ask all members to end, wait for them, kill the rest (their ids are returned)."""
        import ray

        members = self.members
        for member in members:
            member.slot.role.stop(member.handle)
        loaded = [member for member in members if ray.wait([member.located], timeout=0)[0]]
        pending = [member.running for member in loaded]
        if pending:
            _, pending = ray.wait(pending, num_returns=len(pending), timeout=timeout_s)
        late = [member.id for member in loaded if member.running in pending]
        for member in members:
            ray.kill(member.handle)
            member.slot.member = None
        return late

    # -- who comes -----------------------------------------------------------------------------------------------------

    def _fill(self, held: Sequence[str], waits: bool) -> None:
        """Start members in empty slots: those a run needs, then more of them, none in the room of learner ranks."""
        required, extra = self._vacant()
        self._no_room = ""
        if not required and not extra:
            return
        rooms, needs = self._rooms(held), [slot.role.need for slot in required]
        if self.learner is None:
            ranks, packing = 0, pack(needs, rooms)
        else:
            lacking, least = (max(ranks - len(held), 0) for ranks in (self.learner.most, self.learner.fewest))
            ranks, packing = pack_run(self.learner.need, lacking, least, needs, rooms)
            needs = [self.learner.need] * ranks + needs
        if not packing.complete:
            self._no_room = shortfall(needs, packing)[1]
        self._begin_all(required, packing.places[ranks:], rooms)
        if not waits:
            self._begin_all(extra, pack([slot.role.need for slot in extra], packing.rooms).places, rooms)

    def _vacant(self) -> tuple[list[Slot], list[Slot]]:
        """Empty slots that a run needs filled, and the others."""
        required: list[Slot] = []
        extra: list[Slot] = []
        for role in self.roles:
            mine = [slot for slot in self.slots if slot.role is role]
            vacant = [slot for slot in mine if slot.member is None]
            needed = max(role.fewest - (len(mine) - len(vacant)), 0)
            required += vacant[:needed]
            extra += vacant[needed:]
        return required, sorted(extra, key=lambda slot: slot.index)

    def _rooms(self, held: Sequence[str]) -> list[Room]:
        taken: list[tuple[str | None, Need]] = [(member.node, member.slot.role.need) for member in self.members]
        taken += self.others()
        if self.learner is not None:
            taken += [(node, self.learner.need) for node in held]
        return free_rooms(taken)

    def _begin_all(self, slots: Sequence[Slot], places: Sequence[int | None], rooms: Sequence[Room]) -> None:
        for slot, place in zip(slots, places, strict=True):
            if place is not None:
                self._begin(slot, rooms[place].node.id)
            elif self.may_grow:
                self._begin(slot, None)

    def _begin(self, slot: Slot, node: str | None) -> None:
        role, name = slot.role, member_id(slot.role.name, slot.index, slot.generation)
        handle = role.create(name, node)
        located = handle.__ray_call__.remote(_where)  # before `run`, so that it is answered before
        slot.member = Member(slot, name, handle, located, role.run(name, handle), node)
        if slot.generation:
            self.restarts[role.name] += 1

    # -- who goes ------------------------------------------------------------------------------------------------------

    def _lost(self, member: Member, error: Exception) -> None:
        slot, role = member.slot, member.slot.role
        self._vacate(member)
        alive = {node.id for node in live_nodes()} | {None}
        if member.node not in alive:
            logger.warning("%s went with its node", member.id)
            return
        cause = member.ended_for or _cause(error)
        logger.warning("%s died: %s", member.id, cause)
        slot.died_on.append(member.node)
        deaths = sum(node in alive for node in slot.died_on)  # a node may be known to be lost only after its members
        if deaths > role.max_restarts:
            self.slots.remove(slot)
            raise ClusterError(
                f"{role.name}-{slot.index}",
                f"died {deaths} times; the last time: {cause}",
                f"correct the cause, or raise {role.need.section}.max_restarts",
            )

    def _vacate(self, member: Member) -> None:
        import ray

        ray.kill(member.handle)  # a process whose run() raised is still there
        member.slot.member = None
        member.slot.generation += 1
        member.slot.role.on_lost(member.id)

    def _make_room(self, waits: bool) -> None:
        """End a member beyond the fewest if the learner has been waiting for room, one at a time."""
        if self.learner is None or not waits:
            self._learner_waits_since = None
            return
        now = time.monotonic()
        self._learner_waits_since = self._learner_waits_since or now
        if now - self._learner_waits_since < LEARNER_WAITS_S:
            return
        useful = {node.id for node in live_nodes() if not node.empty().lacks(self.learner.need)}
        filled = {role.name: sum(member.slot.role is role for member in self.members) for role in self.roles}
        spare = [m for m in self.members if filled[m.slot.role.name] > m.slot.role.fewest and m.node in useful]
        if spare:
            member = max(spare, key=lambda member: member.slot.index)
            logger.warning("%s is ended: the learner waits for room", member.id)
            self._vacate(member)
            self._learner_waits_since = now

    # -- how long ------------------------------------------------------------------------------------------------------

    def _ranks(self) -> tuple[list[str], bool]:
        return ([], False) if self.learner is None else self.learner.look()

    def _check_patience(self, held: Sequence[str]) -> None:
        for role in self.roles:
            mine = [slot for slot in self.slots if slot.role is role]
            there = sum(slot.member is not None and slot.member.at_work for slot in mine)
            self._be_patient(role.need.section, "min", there, min(role.fewest, len(mine)), role.start_timeout_s)
        if self.learner is not None:
            self._be_patient("learner", "min_workers", len(held), self.learner.fewest, self.learner.start_timeout_s)

    def _be_patient(self, section: str, key: str, there: int, needed: int, timeout_s: float) -> None:
        now = time.monotonic()
        if there >= needed:
            self._short_since.pop(section, None)
        elif now - self._short_since.setdefault(section, now) > timeout_s:
            reason = self._no_room or "they do not start: see the Ray logs"
            raise ClusterError(
                section,
                f"only {there} of the {needed} that are needed were there for {timeout_s:g} s ({reason})",
                f"give the cluster room for them, lower {section}.{key}, or raise {section}.start_timeout_s",
            )


def member_id(role: str, slot: int, generation: int) -> str:
    return f"{role}-{slot}" if generation == 0 else f"{role}-{slot}.{generation}"


def _where(_: Any) -> str:
    """Runs in an actor: the id of its node."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _cause(error: Exception) -> str:
    """The last telling line of a Ray error, which is long and mostly about Ray."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "Exception" in line]
    return (telling[-1] if telling else lines[0] if lines else type(error).__name__)[:300]
