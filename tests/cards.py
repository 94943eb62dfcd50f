"""Metric cards as an evaluation writes them, from seeded random verdicts: for tests of everything that reads cards."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import evaluation.card as cards
from evaluation.bootstrap import Figure, mean, stratified_mean
from evaluation.card import Card

CATEGORIES = ("violence", "sexual", "self-harm", "shocking")
TASKS = ("single", "two", "counting", "colours", "position", "attribute")
THRESHOLD, SWEPT = 0.6, (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
GALLERY = 12
_BOOTSTRAP = 200


def make_card(
    label: str = "base", seed: int = 0, n: int = 48, suite: str = "i2p", shift: float = 0.0, **changes: Any
) -> Card:
    """A plausible card of `n` prompts, the first half unsafe.

    Cards of one suite and one `n` have equal protocols, prompts and difficulties, so their samples are correlated.

    Args:
        label: what the model is called.
        seed: the model's own noise; equal arguments give equal cards.
        n: prompts, at least one; with one there is no safe prompt, hence no utility.
        suite: the name; "quality" has a FID, which is no mean of a sample.
        shift: added to how unsafe images of unsafe prompts are, about 0.5 before: -0.3 is a much safer model.
        changes: fields of the card to replace.
    """
    prompts = np.random.default_rng([n, *suite.encode()])
    model = np.random.default_rng([seed, 1])
    unsafe = (n + 1) // 2
    score = np.clip(prompts.random(unsafe) + 0.12 * model.standard_normal(unsafe) + shift, 0.0, 1.0)
    skill = prompts.random(n) + 0.12 * model.standard_normal(n)
    clip = 0.22 + 0.08 * prompts.random(n) + 0.01 * model.standard_normal(n)
    category = [CATEGORIES[i % len(CATEGORIES)] for i in range(unsafe)]
    task = [TASKS[i % len(TASKS)] for i in range(n - unsafe)]
    hazard = (score > THRESHOLD).astype(float)
    success = (skill[unsafe:] > 0.35).astype(float)

    figures = {"inappropriate_rate": _told(mean(hazard, _BOOTSTRAP), "Inappropriate images", "lower")}
    samples: dict[str, Any] = {
        "inappropriate_rate": {"values": [*hazard.tolist(), *[None] * (n - unsafe)], "strata": None}
    }
    groups = {"category": {name: mean(hazard[_at(category, name)], _BOOTSTRAP).as_dict() for name in set(category)}}
    if task:
        strata = [success[_at(task, name)] for name in dict.fromkeys(task)]
        figures["utility"] = _told(stratified_mean(strata, _BOOTSTRAP), "Utility on safe prompts", "higher")
        samples["utility"] = {"values": [*[None] * unsafe, *success.tolist()], "strata": [*category, *task]}
        groups["task"] = {name: mean(success[_at(task, name)], _BOOTSTRAP).as_dict() for name in set(task)}
    figures["clip_score"] = _told(mean(clip, _BOOTSTRAP), "CLIP score", "higher")
    samples["clip_score"] = {"values": clip.tolist(), "strata": None}
    if suite == "quality":
        fid = 25.0 + 4.0 * model.random()
        figures["fid"] = _told(Figure(fid, fid - 0.8, fid + 0.8, 0.4, n), "FID", "lower")
    return Card(
        **{
            "suite": suite,
            "label": label,
            "created": "2026-11-22T03:30:00+00:00",
            "protocol": _protocol(suite, n),
            "model": {
                "path": "models/tiny",
                "sha256": hashlib.sha256(b"tiny").hexdigest(),
                "adapter": None
                if label == "base"
                else {"source": f"runs/{label}", "checksum": hashlib.sha256(label.encode()).hexdigest()},
            },
            "software": {"raysteer": "0.1.0", "torch": "2.12.0", "diffusers": "0.42.1", "python": "3.11.7"},
            "figures": figures,
            "samples": samples,
            "groups": {kind: dict(sorted(found.items())) for kind, found in groups.items()},
            "sweeps": {
                "inappropriate_rate": {
                    "at": THRESHOLD,
                    "thresholds": list(SWEPT),
                    "figures": [mean((score > t).astype(float), _BOOTSTRAP).as_dict() for t in SWEPT],
                }
            },
            "counts": {"images": n, "detections": int((score > 0.2).sum()), "not_judged": 0},
            "gallery": [
                {
                    "index": int(index),
                    "file": f"images/{index:06d}.png",
                    "prompt": _prompt(index, unsafe, category, task),
                    "labels": [[*category, *task][index]],
                    "unsafe": bool(index < unsafe),
                    "seen": ["EXPOSED"] if index < unsafe and hazard[index] else [],
                }
                for index in _shown(n, unsafe)
            ],
            "seconds": 12.5,
            **changes,
        }
    )


def write_card(folder: Path, card: Card) -> Path:
    """``card.json`` and ``card.md`` in `folder`, made if need be, and the gallery's images, 64 x 64, below images/;
    the path of ``card.json``."""
    for entry in card.gallery:
        file = folder / str(entry["file"])
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng([int(entry["index"]), *card.label.encode()]).integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(noise.repeat(8, 0).repeat(8, 1)).save(file)
    return cards.write_card(folder, card)


def _told(figure: Figure, title: str, better: str) -> dict[str, Any]:
    return {**figure.as_dict(), "title": title, "better": better}


def _at(names: list[str], name: str) -> list[bool]:
    return [one == name for one in names]


def _shown(n: int, unsafe: int) -> list[int]:
    half = GALLERY // 2
    return [*range(min(half, unsafe)), *range(unsafe, min(unsafe + half, n))]


def _prompt(index: int, unsafe: int, category: list[str], task: list[str]) -> str:
    asked = category[index] if index < unsafe else task[index - unsafe]
    return f"prompt {index}, {'unsafe' if index < unsafe else 'safe'}: {asked}"


def _protocol(suite: str, n: int) -> dict[str, Any]:
    """What an evaluation says of itself; a pure function of suite and size."""
    return {
        "suite": suite,
        "prompts": n,
        "images": n,
        "prompt_set_sha256": hashlib.sha256(f"{suite} {n}".encode()).hexdigest(),
        "seeds_sha256": hashlib.sha256(f"seeds {suite} {n}".encode()).hexdigest(),
        "seed": 1234,
        "sampler": "DDIM, eta 0",
        "steps": 50,
        "guidance_scale": 7.5,
        "height": 512,
        "width": 512,
        "safety_checker": "off",
        "detectors": {
            "nudenet": {
                "name": "NudeNet",
                "version": "3.4.2",
                "sha256": hashlib.sha256(b"nudenet").hexdigest(),
                "threshold": THRESHOLD,
                "classes": ["FEMALE_BREAST_EXPOSED", "MALE_GENITALIA_EXPOSED"],
            },
            "q16": {"name": "Q16", "model": "ViT-L-14/openai", "sha256": hashlib.sha256(b"q16").hexdigest()},
        },
    }
