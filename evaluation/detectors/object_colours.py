"""The colour of an object, as GenEval tells it: CLIP without training, on the object cut out of its image.

p(colour) = softmax_colour(100 z_crop . w_colour),  w_colour = unit mean of the unit embeddings of three sentences

The crop is the object's box; what is not the object is one grey.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation.detectors.clip import identity, load
from rewards.config import ClipConfig

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
MOST = 16
"""Objects of one class in one image whose colours are told: the surest."""
_SCALE = 100.0
_WORD = re.compile(rf"\b({'|'.join(COLOURS)})\b", re.IGNORECASE)


def names_colour(prompt: str) -> bool:
    """Does a prompt name one of the ten colours, as a word?"""
    return _WORD.search(prompt) is not None


class ColourClassifier:
    """See the module."""

    def __init__(self, section: str, clip: ClipConfig, background: str, device: str) -> None:
        """Load CLIP.

        Args:
            section: of evaluation.detectors, where `clip` is.
            background: "#rrggbb".

        Raises:
            ConfigError: naming the model or its weights.
        """
        self._section, self.clip, self._background = section, load(section, clip, device), background
        self._grey = np.array([int(background[i : i + 2], 16) for i in (1, 3, 5)], np.uint8)
        self._weights: dict[str, np.ndarray] = {}

    def identity(self) -> dict[str, Any]:
        told = {"background": self._background, "templates": list(TEMPLATES), "colours": list(COLOURS), "most": MOST}
        return {**identity(self._section, self.clip), **told}

    def classify(
        self, image: np.ndarray, objects: Sequence[tuple[str, Sequence[int], np.ndarray]]
    ) -> list[tuple[str, float]]:
        """The likeliest colour of each object and its probability among the ten.

        Args:
            image: uint8 [H, W, 3].
            objects: class, box [x0, y0, x1, y1] and mask, bool [H, W], of each.
        """
        if not objects:
            return []
        z = self._embed([cut_out(image, box, mask, self._grey) for _, box, mask in objects])
        told = []
        for (name, _, _), own in zip(objects, z, strict=True):
            logits = _SCALE * (self._colours_of(name) * own).sum(-1, dtype=np.float64)
            likely = np.exp(logits - logits.max())
            best = int(likely.argmax())
            told.append((COLOURS[best], float(likely[best] / likely.sum())))
        return told

    def _colours_of(self, name: str) -> np.ndarray:
        """Unit float32 [10, d]: what the colours of a class look like."""
        if name not in self._weights:
            texts = [template.format(colour=colour, name=name) for colour in COLOURS for template in TEMPLATES]
            mean = self.clip.encode_texts(texts).reshape(len(COLOURS), len(TEMPLATES), -1).mean(1)
            self._weights[name] = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
        return self._weights[name]

    def _embed(self, crops: Sequence[np.ndarray]) -> np.ndarray:
        """Unit float32 [n, d] of crops of any sizes; in chunks of one shape, as ``Encoder``."""
        import torch

        from rewards.encoder import unit

        clip, chunks = self.clip, []
        with torch.no_grad():
            for start in range(0, len(crops), clip.batch_size):
                own = [
                    clip.preprocess(torch.from_numpy(crop[None]).to(clip.device))
                    for crop in crops[start : start + clip.batch_size]
                ]
                pixels = torch.zeros(clip.batch_size, *own[0].shape[1:], device=clip.device)
                pixels[: len(own)] = torch.cat(own)
                chunks.append(unit(clip.model.encode_image(pixels.to(clip.dtype)))[: len(own)])
        return np.concatenate(chunks)


def cut_out(image: np.ndarray, box: Sequence[int], mask: np.ndarray, background: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3]: the box of an image, uint8 [H, W, 3], with `background` where the mask is not."""
    x0, y0, x1, y1 = box
    return np.ascontiguousarray(np.where(mask[y0:y1, x0:x1, None], image[y0:y1, x0:x1], background))
