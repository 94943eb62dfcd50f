"""A run's status as a person reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.progress import readable_seconds
from cluster.runlock import Holder

OVER = ("finished", "stopped", "failed")
LATE_S = 60.0  # longer than any ordinary pause of the supervising loop


def render(status: Mapping[str, Any], holder: Holder | None, now: float) -> str:
    """The status as text, one fact per line.

    Args:
        status: as `read_status` gives it.
        holder: who holds the run's lock, dead or alive.
        now: seconds since the epoch.
    """
    lines = [("run", _head(status, holder, now)), ("where", _where(status))]
    if status["failure"]:
        lines.append(("failure", status["failure"]))
    if status.get("reason"):
        lines.append(("why", status["reason"]))
    figures = status["figures"]
    if figures:
        lines.append(("speed", _speed(status, now)))
        if "idle/samplers" in figures:  # of a run that draws
            lines.append(("busy", _busy(figures)))
    if status["ledger"]:
        lines.append(("ledger", _ledger(status["ledger"])))
    if status["state"] not in OVER:
        draws, learns = _roles(status)
        if learns:
            lines.append(("learner", _ranks(status["learners"])))
        lines += [("sampler", f"{name}: {_sampler(known)}") for name, known in status["samplers"].items()]
        if draws:
            lines.append(("rewards", ", ".join(status["reward_workers"]) or "no reward worker is there yet"))
        lines += [("slow", text) for text in status["slow"]]
    restarts = [f"{count} × {role}" for role, count in status["restarts"].items() if count]
    if restarts:
        lines.append(("replaced", ", ".join(restarts)))
    return "\n".join(f"{label:<10}{text}" for label, text in lines)


def _head(status: Mapping[str, Any], holder: Holder | None, now: float) -> str:
    done = f"step {status['step']} of {status['steps']}, version {status['version']}"
    stage = status.get("stage")  # runs of earlier versions have none
    if stage and status["state"] != "finished":
        drawn = f" ({stage['groups']} of {stage['of']} groups)" if stage["doing"] == "generating" else ""
        done = f"{stage['doing']}{drawn}, round {stage['round']} of {stage['rounds']}, {done}"
    took = readable_seconds(status["written"] - status["began"])
    ago = readable_seconds(now - status["written"])
    if status["state"] in OVER:
        again = "" if status["state"] == "finished" else "; the same command continues it"
        return f"{status['run']} {status['state']} {ago} ago, after {took}: {done}{again}"
    if holder is None or not holder.alive():
        return f"{status['run']}: no sign of life since {ago}; {done}; the same command continues it"
    late = f"; the supervising loop has not reported for {ago}" if now - status["written"] > LATE_S else ""
    return f"{status['run']} {status['state']} for {took}: {done}{late}"


def _where(status: Mapping[str, Any]) -> str:
    job = f", job {status['job']}" if status["job"] else ""
    return f"process {status['pid']} on {status['host']}{job}"


def _speed(status: Mapping[str, Any], now: float) -> str:
    figures = status["figures"]
    last = "" if status["state"] in OVER else f", last step {readable_seconds(now - status['last_step'])} ago"
    lag = f", lag {figures['staleness/max']:.0f}" if "staleness/max" in figures else ""
    return f"{figures['throughput/images_per_s']:.3g} images/s{lag}{last}"


def _busy(figures: Mapping[str, float]) -> str:
    """How busy each role was in the last step; the busiest is what the others wait for."""
    busy = {role: 1.0 - figures[f"idle/{role}"] for role in ("samplers", "reward_workers", "learner")}
    shown = ", ".join(f"{role.replace('_', ' ')} {share:.0%}" for role, share in busy.items())
    return f"{shown}; the pace is set by the {max(busy, key=lambda role: busy[role]).replace('_', ' ')}"


def _roles(status: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether somebody draws and scores, and whether somebody learns: in a round it is one or the other."""
    doing = (status.get("stage") or {}).get("doing")
    from_dataset = doing == "learning" or bool(status["ledger"] and "leased" not in status["ledger"])
    return not from_dataset, doing != "generating"


def _ledger(counts: Mapping[str, Any]) -> str:
    dropped = ", ".join(f"{reason} {count}" for reason, count in counts["dropped"].items())
    if "leased" not in counts:  # nobody draws: the ledger of a desk
        learned = f"{counts['delivered'] + counts['committed']} groups learned, {counts['committed']} in a checkpoint"
        return f"{learned}; left out of the dataset: {dropped or 'nothing'}"
    terms = ", ".join(
        f"{counts[name]} {name.replace('_', ' ')}" for name in ("in_flight", "ready", "delivered", "committed")
    )
    lost = f", {sum(counts['dropped'].values())} dropped" + (f" ({dropped})" if dropped else "")
    return f"{counts['leased']} groups leased: {terms}{lost}"


def _ranks(count: int) -> str:
    return "not up yet" if not count else "1 rank" if count == 1 else f"{count} ranks"


def _sampler(known: Mapping[str, Any]) -> str:
    each = "" if known["group_s"] is None else f", {known['group_s']:.1f} s each"
    doing = "waits for a lease" if known["drawing_s"] is None else f"draws since {known['drawing_s']:.0f} s"
    return f"{known['groups']} groups{each}, {doing}"
