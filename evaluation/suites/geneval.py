"""GenEval (Ghosh et al. 2023, arXiv 2310.11513): does an image show the objects, counts, colours and places asked for?

553 prompts in six tasks (80 single_object, 99 two_object, 80 counting, 94 colors, 100 position, 100 color_attr), four
images each. An image is right or wrong (``geneval_rules``); an accuracy is the share of right images; the score is the
mean of the tasks' accuracies. The prompts are not ours to ship: ``evaluation_metadata.jsonl`` of djghosh13/geneval.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, Field

from evaluation.bootstrap import Figure
from evaluation.detectors.object_colours import COLOURS, MOST, names_colour
from evaluation.detectors.objects import class_name
from evaluation.suites.base import Ask, Findings, Meaning, Sample, Sweep, Verdict, figure_of
from evaluation.suites.geneval_rules import COUNTING, RELATIONS, TASKS, Clause, Thresholds, Wanted, faults, kept
from raysteer.errors import PromptError

_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_REMEDY = "take evaluation_metadata.jsonl of djghosh13/geneval, or correct the line"
_CLAUSE = ("class", "count", "color", "position")


class GenEvalConfig(BaseModel, frozen=True, extra="forbid"):
    """``file`` is GenEval's ``evaluation_metadata.jsonl``; the rest are the published settings.

    ``confidence`` and ``counting_confidence`` are what an object's score must exceed; ``max_objects`` of a class count,
    the surest. ``max_overlap`` below 1 drops an object that overlaps a surer one of its class by so much. The distance
    of two objects is shortened by ``position_shrink`` of their sizes before one is beside the other.
    """

    file: str = Field(min_length=1)
    images_per_prompt: int = Field(4, ge=1)
    confidence: float = Field(0.3, ge=0.1, lt=1.0)
    counting_confidence: float = Field(0.9, ge=0.1, lt=1.0)
    max_objects: int = Field(16, ge=1, le=MOST)
    max_overlap: float = Field(1.0, gt=0.0, le=1.0)
    position_shrink: float = Field(0.1, ge=0.0, le=1.0)

    def thresholds(self) -> Thresholds:
        return Thresholds(
            self.confidence, self.counting_confidence, self.max_objects, self.max_overlap, self.position_shrink
        )


class GenEval:
    """See the module. ``limit`` takes the first prompts of each task in turn; each keeps its seeds."""

    name: ClassVar[str] = "geneval"
    detectors: tuple[str, ...] = ("objects",)
    meanings: ClassVar[Mapping[str, Meaning]] = {
        "score": Meaning("GenEval score (mean of the tasks)", "higher"),
        "image_accuracy": Meaning("images that are right", "higher"),
        "prompts_any": Meaning("prompts with a right image", "higher"),
        "prompts_all": Meaning("prompts with only right images", "higher"),
        COUNTING: Meaning("counting accuracy", "higher"),
    }

    def __init__(self, config: GenEvalConfig, seed: int, limit: int | None = None) -> None:
        """Read and check the file.

        Raises:
            PromptError: with the file and the line.
        """
        self.config, self.at = config, config.thresholds()
        read = read_metadata(Path(config.file), config.max_objects)
        each = config.images_per_prompt
        state = np.random.SeedSequence(seed % 2**64).generate_state(len(read) * each)
        seeds = state.reshape(len(read), each).tolist()
        nth: Counter[str] = Counter()
        ranks = []
        for _, wanted in read:
            ranks.append(nth[wanted.task])
            nth[wanted.task] += 1
        chosen = sorted(sorted(range(len(read)), key=lambda index: (ranks[index], index))[:limit])
        self.wanted = [read[index][1] for index in chosen]
        self.asks = [
            Ask(read[i][0], tuple(seeds[i]), (read[i][1].task,), spec={"wanted": asdict(read[i][1])}) for i in chosen
        ]

    def protocol(self) -> dict[str, Any]:
        prompts = Counter(wanted.task for wanted in self.wanted)
        asked = json.dumps([ask.spec["wanted"] for ask in self.asks])
        return {
            "tasks": {task: prompts[task] for task in TASKS if task in prompts},
            "wanted_sha256": hashlib.sha256(asked.encode()).hexdigest(),
            **asdict(self.at),
            "position_component": 0.5,
        }

    def find(self, verdicts: Sequence[Verdict], bootstrap_samples: int) -> Findings:
        seen = self._faults(verdicts, self.at)
        samples = self._samples([not wrong for wrong in seen])
        figures = {name: figure_of(samples[name], bootstrap_samples) for name in self.meanings if name in samples}
        own = [wanted.task for wanted in self.wanted]
        by_task = {
            task: Sample(tuple(v if t == task else None for t, v in zip(own, samples["score"].values, strict=True)))
            for task in TASKS
            if task in own
        }
        counted = [
            sum(map(len, kept(verdict["objects"], wanted.task, self.at).values()))
            for wanted, verdict in self._judged(verdicts)
        ]
        return Findings(
            figures=figures,
            samples=samples,
            groups={"task": {task: figure_of(sample, bootstrap_samples) for task, sample in by_task.items()}},
            sweeps=self._sweeps(verdicts, bootstrap_samples),
            counts={
                "images": len(verdicts),
                "images_right": sum(not wrong for wrong in seen),
                "images_without_objects": sum(not n for n in counted),
                "objects": sum(counted),
            },
            seen=seen,
        )

    def _judged(self, verdicts: Sequence[Verdict]) -> list[tuple[Wanted, Verdict]]:
        each = [wanted for wanted, ask in zip(self.wanted, self.asks, strict=True) for _ in ask.seeds]
        return list(zip(each, verdicts, strict=True))

    def _faults(self, verdicts: Sequence[Verdict], at: Thresholds) -> list[tuple[str, ...]]:
        return [
            faults(wanted, kept(verdict["objects"], wanted.task, at), at) for wanted, verdict in self._judged(verdicts)
        ]

    def _samples(self, right: Sequence[bool]) -> dict[str, Sample]:
        """Every figure's, from whether each image is right."""
        grid = np.array(right, float).reshape(len(self.asks), self.config.images_per_prompt)
        tasks = tuple(wanted.task for wanted in self.wanted)
        shares = tuple(grid.mean(1).tolist())
        samples = {
            "score": Sample(shares, tasks),
            "image_accuracy": Sample(shares),
            "prompts_any": Sample(tuple(grid.max(1).tolist())),
            "prompts_all": Sample(tuple(grid.min(1).tolist())),
        }
        if COUNTING in tasks:
            own = zip(tasks, shares, strict=True)
            samples[COUNTING] = Sample(tuple(share if task == COUNTING else None for task, share in own))
        return samples

    def _sweeps(self, verdicts: Sequence[Verdict], bootstrap_samples: int) -> dict[str, Sweep]:
        """The score over the confidence of all tasks but counting, and counting over its own."""

        def figures(name: str, field: str) -> tuple[Figure, ...]:
            found = []
            for threshold in swept[field]:
                wrong = self._faults(verdicts, replace(self.at, **{field: threshold}))
                found.append(figure_of(self._samples([not each for each in wrong])[name], bootstrap_samples))
            return tuple(found)

        fields = {"score": "confidence"}
        tasks = {wanted.task for wanted in self.wanted}
        if COUNTING in tasks:
            fields[COUNTING] = "counting_confidence"
        if tasks == {COUNTING}:
            fields["score"] = "counting_confidence"
        swept = {field: tuple(sorted({*_THRESHOLDS, getattr(self.at, field)})) for field in fields.values()}
        return {
            name: Sweep(getattr(self.at, field), swept[field], figures(name, field)) for name, field in fields.items()
        }


def read_metadata(path: Path, max_objects: int) -> list[tuple[str, Wanted]]:
    """Prompts and what they ask for, of a file with one JSON object per line.

    Raises:
        PromptError: with the file, the line and a remedy.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise PromptError(str(path), f"cannot be read ({reason})", _REMEDY) from None
    read = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                read.append(_parsed(line, max_objects))
            except ValueError as error:
                raise PromptError(f"{path}:{number}", str(error), _REMEDY) from None
    if not read:
        raise PromptError(str(path), "holds no prompts", _REMEDY)
    return read


def _parsed(line: str, max_objects: int) -> tuple[str, Wanted]:
    """A line of the file. Raises ValueError: what is wrong with it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("is no JSON") from None
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    missing = [key for key in ("tag", "include", "prompt") if key not in row]
    if missing:
        raise ValueError(f"has no {missing[0]!r}; its keys are: {', '.join(map(str, row)) or 'none'}")
    task, prompt = row["tag"], row["prompt"]
    if task not in TASKS:
        raise ValueError(f"has the tag {task!r}, which is no task of GenEval ({', '.join(TASKS)})")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError("has an empty prompt")
    clauses: dict[str, tuple[Clause, ...]] = {}
    for side in ("include", "exclude"):
        items = row.get(side, [])
        if not isinstance(items, list) or (side == "include" and not items):
            raise ValueError(f"has no list of objects under {side!r}")
        clauses[side] = tuple(_clause(item, side, index, max_objects) for index, item in enumerate(items))
    if any(clause.colour for clause in clauses["include"]) and not names_colour(prompt):
        raise ValueError(f"asks for a colour that its prompt {prompt!r} does not name, and colours are told only then")
    return prompt, Wanted(task, clauses["include"], clauses["exclude"])


def _clause(item: Any, side: str, index: int, max_objects: int) -> Clause:
    """An entry of "include" or "exclude". Raises ValueError: what is wrong with it."""
    where = f"{side}[{index}]"
    if not isinstance(item, dict):
        raise ValueError(f"{where} is no JSON object")
    allowed = _CLAUSE if side == "include" else _CLAUSE[:2]
    unknown = [key for key in item if key not in allowed]
    missing = [key for key in _CLAUSE[:2] if key not in item]
    if unknown or missing:
        problem = f"has {unknown[0]!r}, which has no rule" if unknown else f"has no {missing[0]!r}"
        raise ValueError(f"{where} {problem}; its keys may be: {', '.join(allowed)}")
    label, count, colour, position = (item.get(key) for key in _CLAUSE)
    name = class_name(label) if isinstance(label, str) else None
    if name is None:
        raise ValueError(f"{where} asks for {label!r}, which is none of COCO's 80 classes")
    if type(count) is not int or not 1 <= count <= max_objects:
        raise ValueError(f"{where} has the count {count!r}, which is not 1 to {max_objects} (max_objects)")
    if colour is not None and colour not in COLOURS:
        raise ValueError(f"{where} has the color {colour!r}, which is none of {', '.join(COLOURS)}")
    return Clause(name, count, colour, None if position is None else _position(position, where, index))


def _position(position: Any, where: str, index: int) -> tuple[str, int]:
    shape = isinstance(position, list) and len(position) == 2
    if not shape or position[0] not in RELATIONS or type(position[1]) is not int or not 0 <= position[1] < index:
        raise ValueError(
            f"{where} has the position {position!r}, which is not [one of {', '.join(RELATIONS)}; the index of an "
            "earlier object]"
        )
    return str(position[0]), position[1]
