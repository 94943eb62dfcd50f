"""What an evaluation has drawn and seen so far, on disk: an interrupted one goes on where it stopped.

images/000000.png      every image, losslessly, under the index of its shot
drawn.json             what the images are of: model, adapter, prompts, seeds, sampling
verdicts-<hash>.jsonl  what these detectors saw: a row for each chunk, {"images": [...], "verdicts": [...]}
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cluster.config import digest
from evaluation.suites.base import Verdict
from learner.records import append_row, read_rows

IMAGES, DRAWN = "images", "drawn.json"


class EvaluationStore:
    """The folder of one model's evaluation.

    Args:
        folder: made if it is not there. If it holds images of something else, it is moved aside first.
        drawn: what decides the images; JSON values.

    Attributes:
        moved: where the evaluation of something else is now, None if there was none.
    """

    def __init__(self, folder: Path, drawn: Mapping[str, Any]) -> None:
        self.folder, self.images = folder, folder / IMAGES
        self.moved: Path | None = None
        wanted = json.dumps(drawn, indent=1, sort_keys=True) + "\n"
        if folder.is_dir() and any(folder.iterdir()) and _text(folder / DRAWN) != wanted:
            self.moved = _unused(folder)
            folder.rename(self.moved)
        self.images.mkdir(parents=True, exist_ok=True)
        _replace(folder / DRAWN, wanted.encode())

    def file(self, index: int) -> Path:
        return self.folder / image_name(index)

    def write(self, indices: Sequence[int], images: np.ndarray) -> None:
        """Keep images, uint8 [n, H, W, 3]. Raises OSError when the disk refuses."""
        for index, image in zip(indices, images, strict=True):
            beside = self.images / f".{index:06d}.{os.getpid()}.png"
            Image.fromarray(image).save(beside, compress_level=1)
            os.replace(beside, self.file(index))

    def read(self, indices: Sequence[int]) -> np.ndarray | None:
        """uint8 [n, H, W, 3]; None if one of them is missing or damaged, so that all are to be drawn again."""
        return self.images_of(self.folder, indices)

    @staticmethod
    def images_of(folder: Path, indices: Sequence[int]) -> np.ndarray | None:
        """As `read`, of a folder that nothing is to be added to."""
        found = []
        for index in indices:
            try:
                with Image.open(folder / image_name(index)) as image:
                    found.append(np.asarray(image.convert("RGB")))
            except (OSError, SyntaxError):  # Pillow's word for a broken PNG
                return None
        return np.stack(found) if len({image.shape for image in found}) == 1 else None

    def has(self, indices: Sequence[int]) -> bool:
        return all(self.file(index).is_file() for index in indices)

    def verdicts(self, detectors: Mapping[str, Any]) -> dict[int, Verdict]:
        """What these detectors, by identity, have seen so far; by image."""
        rows = read_rows(self._verdict_file(detectors))
        return {index: verdict for row in rows for index, verdict in zip(row["images"], row["verdicts"], strict=True)}

    def add_verdicts(self, detectors: Mapping[str, Any], indices: Sequence[int], seen: Sequence[Verdict]) -> None:
        """Keep what was seen. Raises OSError when the disk refuses."""
        append_row(self._verdict_file(detectors), {"images": list(indices), "verdicts": list(seen)})

    def _verdict_file(self, detectors: Mapping[str, Any]) -> Path:
        return self.folder / f"verdicts-{digest(detectors)[:12]}.jsonl"


def image_name(index: int) -> str:
    """Where an image is, below the folder of its evaluation."""
    return f"{IMAGES}/{index:06d}.png"


def folder_name(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r"[^\w.-]+", "-", label).strip(".-") or "model"


def _unused(folder: Path) -> Path:
    number = 1
    while (place := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return place


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _replace(path: Path, data: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(data)
    os.replace(beside, path)
