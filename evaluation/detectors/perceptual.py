"""How different two images look: distances of deep features, in the form of LPIPS (Zhang et al. 2018, equation 1).

At several layers of a CLIP image tower the features of every position get unit length; the squared differences are
summed over channels and averaged over positions, then over layers. It is not LPIPS: that has an AlexNet or VGG and
weights per channel learned from people's judgements, here all weigh the same. So its values compare only with others
of the same model and layers: 0 is the same image, 2 features that have nothing in common, 4 is the most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from evaluation.detectors.clip import check_model, identity, load
from rewards.config import ClipConfig

_DIGITS = 6
_TINY = 1e-10  # the least length that is divided by: a feature of all zeros stays zero


class PerceptualConfig(ClipConfig, frozen=True, extra="forbid"):
    """The CLIP model, as for the detector ``clip``; ``layers`` of its image tower, spread evenly over its depth, the
    last one among them. A tower with fewer gives all it has (a ResNet has 5 stages).
    """

    layers: int = Field(default=5, ge=1)


class PerceptualDetector:
    """Each verdict is the distance to the base model's image, a float in [0, 4]; 0 for an image of the base model."""

    name = "perceptual"

    def __init__(self, config: PerceptualConfig, device: str = "cpu") -> None:
        """Load the model.

        Raises:
            ConfigError: naming evaluation.detectors.perceptual.model or .pretrained.
        """
        self.config = config
        self.scorer = load(self.name, ClipConfig(**config.model_dump(exclude={"layers"})), device)

    def identity(self) -> dict[str, Any]:
        return {**identity(self.name, self.scorer, self.scorer.model.visual), "layers": self.config.layers}

    def detect(self, images: np.ndarray, prompts: Sequence[str], base: np.ndarray | None) -> list[Any]:
        from rewards.base import check_images

        check_images(images, prompts)
        if base is None:
            return [0.0] * len(images)
        check_images(base, prompts)
        size = self.config.batch_size
        distances = [
            self._distance(images[start : start + size], base[start : start + size])
            for start in range(0, len(images), size)
        ]
        return [round(float(value), _DIGITS) for value in np.concatenate(distances)]

    def _distance(self, images: np.ndarray, base: np.ndarray) -> np.ndarray:
        """float [n] of at most `batch_size` pairs."""
        pairs = zip(self._features(images), self._features(base), strict=True)
        layers = [(one - other).square().sum(dim=1).flatten(1).mean(dim=1) for one, other in pairs]
        mean: np.ndarray = (sum(layers) / len(layers)).cpu().numpy()
        return mean[: len(images)]

    def _features(self, images: np.ndarray) -> list[Any]:
        """float32 [batch_size, channels, h, w] of each layer; short batches are padded, so that no image's features
        depend on its neighbours (`rewards.encoder`).
        """
        import torch
        from torch.nn import functional as F

        padded = np.zeros((self.config.batch_size, *images.shape[1:]), np.uint8)
        padded[: len(images)] = images
        with torch.no_grad():
            pixels = self.scorer.preprocess(torch.from_numpy(padded).to(self.scorer.device)).to(self.scorer.dtype)
            found = self.scorer.model.visual.forward_intermediates(pixels, intermediates_only=True)
            layers = found["image_intermediates"]
            chosen = spread(len(layers), self.config.layers)
            return [F.normalize(layers[index].float(), dim=1, eps=_TINY) for index in chosen]


def spread(depth: int, count: int) -> list[int]:
    """At most `count` indices below `depth`, evenly spaced, the last one among them."""
    count = min(count, depth)
    return [(number + 1) * depth // count - 1 for number in range(count)]


def check(config: PerceptualConfig | None) -> None:
    """Raises ConfigError: there is no model, or it cannot work."""
    check_model("perceptual", config)
