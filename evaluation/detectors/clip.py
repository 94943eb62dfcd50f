"""CLIP as a detector: does an image fit its prompt, and how like the base model's image is it?

Both are plain cosines in [-1, 1] (CLIP-T and CLIP-I). Other scales of the same number: 100 times it (torchmetrics), or
2.5 times it and never below 0 (CLIPScore, Hessel et al. 2021). Cosines of two CLIP models are not comparable.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from raysteer.errors import ConfigError
from rewards.config import ClipConfig

if TYPE_CHECKING:
    from rewards.clip import ClipScorer

EXAMPLE = "model: ViT-L-14-quickgelu, pretrained: openai"
_DIGITS = 6  # of a cosine: beyond are the rounding errors of float32


class ClipDetector:
    """Each verdict is {"text": cosine of image and prompt, "base": cosine of image and the base model's image}; an
    image of the base model itself has 1 there, by definition.
    """

    name = "clip"

    def __init__(self, config: ClipConfig, device: str = "cpu") -> None:
        """Load the model.

        Raises:
            ConfigError: naming evaluation.detectors.clip.model or .pretrained.
        """
        self.config, self.scorer = config, load(self.name, config, device)

    def identity(self) -> dict[str, Any]:
        return identity(self.name, self.scorer)

    def detect(self, images: np.ndarray, prompts: Sequence[str], base: np.ndarray | None) -> list[Any]:
        from rewards.base import check_images
        from rewards.encoder import rowwise_dot

        check_images(images, prompts)
        z = self.scorer.encode_images(images)
        text = rowwise_dot(z, self.scorer.encode_texts(prompts))
        if base is None:
            alike = np.ones(len(images), np.float32)
        else:
            check_images(base, prompts)
            alike = rowwise_dot(z, self.scorer.encode_images(base))
        return [
            {"text": round(float(a), _DIGITS), "base": round(float(b), _DIGITS)}
            for a, b in zip(text, alike, strict=True)
        ]


def check(config: ClipConfig | None) -> None:
    """Raises ConfigError: there is no model, or it cannot work."""
    check_model("clip", config)


def check_model(name: str, config: ClipConfig | None) -> None:
    """The same for another detector that looks with an open_clip model; `name` is its section."""
    if config is None:
        raise ConfigError(f"evaluation.detectors.{name}", None, f"it looks with an open_clip model: add {EXAMPLE}")
    from rewards.clip import check_clip

    with _located(name):
        check_clip(config)


def load(name: str, config: ClipConfig, device: str) -> ClipScorer:
    """The model of a detector; detectors of one process share it.

    Raises:
        ConfigError: naming a key of evaluation.detectors.<name>.
    """
    from rewards.clip import clip_scorer

    with _located(name):
        return clip_scorer(config, device)


def identity(name: str, scorer: ClipScorer, module: Any = None) -> dict[str, Any]:
    """Who looked, by content, so that a model is the same by its name and from a folder, on every machine.

    Args:
        module: the part of the model that looked; None is all of it.
    """
    preprocess, module = scorer.preprocess, scorer.model if module is None else module
    return {
        "name": name,
        "version": 1,
        "weights_sha256": _weights_sha256(module),
        "activations": sorted({type(m).__name__ for m in module.modules() if "GELU" in type(m).__name__}),
        "precision": scorer.cfg.precision,
        "input": list(preprocess.size),
        "resize": f"{preprocess.resize_mode} {preprocess.interpolation}",
        "normalise": [preprocess.mean.flatten().tolist(), preprocess.std.flatten().tolist()],
    }


def _weights_sha256(model: Any) -> str:
    """Over names, dtypes, shapes and bytes of a module's state."""
    import torch

    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def _located(name: str) -> Iterator[None]:
    """The model is loaded by the rewards' code, whose errors name the reward's key."""
    try:
        yield
    except ConfigError as error:
        if not error.key.startswith("reward.clip"):
            raise
        key = f"evaluation.detectors.{name}" + error.key.removeprefix("reward.clip")
        raise ConfigError(key, error.value, error.remedy) from error
