"""Supervisor: starts the members of a role, notices when one dies, replaces it, and ends them all.

A member is an actor with a `run` call that lasts as long as the member does: its future failing is how a death is
noticed, at once and without polling the member. A replacement has a new id, so that what the dead one left behind can
be told apart.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from raysteer.errors import ClusterError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Role:
    """One kind of member.

    Attributes:
        name: "sampler"; members are called sampler-0, its replacement sampler-0.1 and so on.
        create: id -> actor handle (returns at once; loading happens in the actor).
        run: (id, handle) -> reference that resolves when the member is done and fails when it dies.
        stop: handle -> None, asks the member to end (it may also learn that elsewhere).
        on_lost: id -> None, called before a replacement is started.
        max_restarts: replacements of one slot.
    """

    name: str
    count: int
    create: Callable[[str], Any]
    run: Callable[[str, Any], Any]
    stop: Callable[[Any], None]
    on_lost: Callable[[str], None]
    max_restarts: int


@dataclass
class Member:
    role: Role
    slot: int
    generation: int
    handle: Any
    running: Any
    started: float = field(default_factory=time.monotonic)

    @property
    def id(self) -> str:
        return member_id(self.role.name, self.slot, self.generation)


def member_id(role: str, slot: int, generation: int) -> str:
    return f"{role}-{slot}" if generation == 0 else f"{role}-{slot}.{generation}"


class Supervisor:
    """Keeps the members of all roles alive. `restarts` counts replacements by role."""

    def __init__(self, roles: Sequence[Role]) -> None:
        self.members: list[Member] = []
        self.restarts: dict[str, int] = {role.name: 0 for role in roles}
        self.roles = roles

    def start(self) -> None:
        for role in self.roles:
            for slot in range(role.count):
                self.members.append(self._start(role, slot, 0))

    def poll(self, timeout_s: float) -> None:
        """Wait for at most `timeout_s`; replace whoever died. Raises ClusterError when one has died too often."""
        import ray

        if not self.members:
            time.sleep(timeout_s)
            return
        by_ref = {member.running: member for member in self.members}
        ended, _ = ray.wait(list(by_ref), num_returns=1, timeout=timeout_s)
        for reference in ended:
            member = by_ref[reference]
            self.members.remove(member)
            try:
                ray.get(reference)
                ray.kill(member.handle)  # it was told to end, and has
            except ray.exceptions.RayError as error:
                self._replace(member, error)

    def kill(self, member_id: str, reason: str) -> None:
        """End a member that is there but does not answer; `poll` replaces it."""
        import ray

        for member in self.members:
            if member.id == member_id:
                logger.warning("%s is ended: %s", member_id, reason)
                ray.kill(member.handle)

    def stop(self, timeout_s: float) -> list[str]:
        """Ask all members to end, wait for them, kill the rest (their ids are returned)."""
        import ray

        for member in self.members:
            member.role.stop(member.handle)
        pending = [member.running for member in self.members]
        if pending:
            _, pending = ray.wait(pending, num_returns=len(pending), timeout=timeout_s)
        late = [member.id for member in self.members if member.running in pending]
        for member in self.members:
            ray.kill(member.handle)
        self.members = []
        return late

    def _start(self, role: Role, slot: int, generation: int) -> Member:
        name = member_id(role.name, slot, generation)
        handle = role.create(name)
        return Member(role, slot, generation, handle, role.run(name, handle))

    def _replace(self, member: Member, error: Exception) -> None:
        import ray

        cause = _cause(error)
        logger.warning("%s died: %s", member.id, cause)
        ray.kill(member.handle)  # a process whose run() raised is still there
        member.role.on_lost(member.id)
        if member.generation >= member.role.max_restarts:
            raise ClusterError(
                f"{member.role.name}-{member.slot}",
                f"died {member.generation + 1} times; the last time: {cause}",
                f"correct the cause, or raise {member.role.name}s.max_restarts",
            )
        self.restarts[member.role.name] += 1
        self.members.append(self._start(member.role, member.slot, member.generation + 1))


def _cause(error: Exception) -> str:
    """The last telling line of a Ray error, which is long and mostly about Ray."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "Exception" in line]
    return (telling[-1] if telling else lines[0] if lines else type(error).__name__)[:300]
