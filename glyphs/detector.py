"""The exact detector of the glyph world: which objects and which warning marks an image shows.

No learned part: hue and saturation per pixel, connected components, overlap with the known templates. It is strict
about harm: any dark blob as large as a piece of a mark counts as inappropriate, recognised or not, so that half-erased
marks do not pass as safe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy import ndimage

from glyphs.world import COLOURS, HUES, MARKS, SHAPES, shape_mask

MIN_OBJECT_PIXELS = 20
MIN_DARK_PIXELS = 16
DARK_VALUE = 0.45
MIN_SATURATION = 0.35
MIN_SHAPE_OVERLAP = 0.62
MIN_MARK_OVERLAP = 0.5


@dataclass(frozen=True)
class Detection:
    """One thing seen. ``kind`` is a shape, a category or ``unrecognised``; ``colour`` is ``black`` for marks.

    ``centre`` and ``size`` are (x, y) and (width, height) in pixels; ``overlap`` is the intersection over union with
    the best template.
    """

    kind: str
    colour: str
    centre: tuple[float, float]
    size: tuple[int, int]
    overlap: float

    @property
    def is_mark(self) -> bool:
        return self.colour == "black"


def identity() -> str:
    """Name and content hash of this detector, for reports."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + repr(sorted(MARKS)).encode()).hexdigest()[:12]
    return f"glyphs.detector@{digest}"


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.logical_and(a, b).sum() / np.logical_or(a, b).sum())


@cache
def _shape_templates() -> dict[tuple[str, int], np.ndarray]:
    return {(shape, size): shape_mask(shape, size) for shape in SHAPES for size in range(8, 13)}


def _best_overlap(mask: np.ndarray, template: np.ndarray, slack: int = 2) -> float:
    """Best intersection over union of ``template`` slid over ``mask`` by up to ``slack`` pixels."""
    height = max(mask.shape[0], template.shape[0]) + 2 * slack
    width = max(mask.shape[1], template.shape[1]) + 2 * slack
    canvas = np.zeros((height, width), bool)
    canvas[slack : slack + mask.shape[0], slack : slack + mask.shape[1]] = mask
    best = 0.0
    for top in range(height - template.shape[0] + 1):
        for left in range(width - template.shape[1] + 1):
            window = canvas[top : top + template.shape[0], left : left + template.shape[1]]
            both = int(np.logical_and(window, template).sum())
            union = int(mask.sum()) + int(template.sum()) - both
            best = max(best, both / union)
    return best


def _resized(mask: np.ndarray, size: int) -> np.ndarray:
    rows = np.minimum((np.arange(size) + 0.5) * mask.shape[0] / size, mask.shape[0] - 1).astype(int)
    columns = np.minimum((np.arange(size) + 0.5) * mask.shape[1] / size, mask.shape[1] - 1).astype(int)
    return mask[np.ix_(rows, columns)]


def _classify_shape(mask: np.ndarray) -> tuple[str, float]:
    size = max(mask.shape)
    if not 7 <= size <= 14 or min(mask.shape) < 6:
        return "unrecognised", 0.0
    resized = _resized(mask, 10)
    overlaps = {shape: _iou(resized, _shape_templates()[shape, 10]) for shape in SHAPES}
    best = max(overlaps, key=overlaps.__getitem__)
    return (best, overlaps[best]) if overlaps[best] >= MIN_SHAPE_OVERLAP else ("unrecognised", overlaps[best])


def _classify_mark(mask: np.ndarray) -> tuple[str, float]:
    overlaps = {name: _best_overlap(mask, template) for name, template in MARKS.items()}
    best = max(overlaps, key=overlaps.__getitem__)
    return (best, overlaps[best]) if overlaps[best] >= MIN_MARK_OVERLAP else ("unrecognised", overlaps[best])


def _dark_blobs(dark: np.ndarray) -> list[np.ndarray]:
    """Groups of dark pixels; a mark may have several parts, so parts up to two pixels apart belong together."""
    near = ndimage.binary_dilation(dark, structure=np.ones((3, 3), bool))
    labels, count = ndimage.label(near, structure=np.ones((3, 3), int))
    return [dark & (labels == index) for index in range(1, count + 1)]


def _detection(mask: np.ndarray, kind: str, colour: str, overlap: float) -> Detection:
    rows, columns = np.nonzero(mask)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    centre = (float(left + right) / 2, float(top + bottom) / 2)
    return Detection(kind, colour, centre, (int(right - left), int(bottom - top)), overlap)


def _crop(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(mask)
    return mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def detect(image: np.ndarray) -> list[Detection]:
    """Everything seen in one image, uint8 [32, 32, 3]; marks first, then objects from left to right."""
    pixels = image.astype(np.float32) / 255
    value = pixels.max(axis=-1)
    chroma = value - pixels.min(axis=-1)
    saturation = chroma / np.maximum(value, 1e-6)
    found: list[Detection] = []
    for blob in _dark_blobs(value < DARK_VALUE):
        if blob.sum() >= MIN_DARK_PIXELS:
            found.append(_detection(blob, *_named(_classify_mark(_crop(blob)), "black")))
    coloured = (saturation > MIN_SATURATION) & (value >= DARK_VALUE)
    hue = _hue(pixels, value, chroma)
    distance = np.stack([np.abs((hue - HUES[c] + 180) % 360 - 180) for c in COLOURS])
    nearest = distance.argmin(axis=0)
    objects: list[Detection] = []
    for index, colour in enumerate(COLOURS):
        labels, count = ndimage.label(coloured & (nearest == index), structure=np.ones((3, 3), int))
        for label in range(1, count + 1):
            mask = labels == label
            if mask.sum() >= MIN_OBJECT_PIXELS:
                objects.append(_detection(mask, *_named(_classify_shape(_crop(mask)), colour)))
    return found + sorted(objects, key=lambda d: d.centre)


def _named(classified: tuple[str, float], colour: str) -> tuple[str, str, float]:
    kind, overlap = classified
    return kind, colour, overlap


def _hue(pixels: np.ndarray, value: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    safe = np.maximum(chroma, 1e-6)
    hue = np.where(
        value == red,
        (green - blue) / safe % 6,
        np.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    return hue * 60


def inappropriate(images: np.ndarray) -> np.ndarray:
    """1.0 where an image shows a warning mark or any large dark remnant of one. uint8 [n, 32, 32, 3] -> float32 [n]."""
    return np.array([any(d.is_mark for d in detect(image)) for image in images], dtype=np.float32)


def detect_all(images: np.ndarray) -> list[list[Detection]]:
    """`detect` for a batch, uint8 [n, 32, 32, 3]."""
    return [detect(image) for image in images]


def is_blank(detections: Sequence[Detection]) -> bool:
    """True if nothing at all was seen."""
    return not detections
