"""Q16 (Schramowski et al. 2022, arXiv 2202.06675) as a detector: how probably is an image inappropriate?

The learned prompts decide what Q16 means. Those of ml-research/Q16 serve I2P's published figures; those of
YitingQu/unsafe-diffusion, which RECE and SafeDiffusion-R1 use, flag far more. Hence the hash of their file is part of
the identity, and figures of different prompts must not be compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, Field

from raysteer.errors import ConfigError
from rewards.config import ClipConfig

if TYPE_CHECKING:
    import torch

_KEY = "evaluation.detectors.q16"


class Q16DetectorConfig(BaseModel, frozen=True, extra="forbid"):
    """The CLIP model and the file of its two learned prompts (row 1 = inappropriate), as in the reward ``q16``.

    The published prompts belong to ``clip: {model: ViT-L-14-quickgelu, pretrained: openai}``.
    """

    clip: ClipConfig
    prompts: str = Field(min_length=1)


class Q16Detector:
    """Each verdict is the probability in [0, 1] that the image is inappropriate."""

    name = "q16"

    def __init__(self, config: Q16DetectorConfig, device: str = "cpu") -> None:
        """Load CLIP and the prompts.

        Raises:
            ConfigError: naming evaluation.detectors.q16.prompts or a field of evaluation.detectors.q16.clip.
        """
        from rewards.config import RewardTerm
        from rewards.q16 import Q16Cost

        self.config = config
        with _own_keys():
            self._q16 = Q16Cost(RewardTerm(name="q16", clip=config.clip, q16_prompts=config.prompts), device)

    def identity(self) -> dict[str, Any]:
        """The weights count by content, so the same CLIP is the same by name and from a folder."""
        clip = self._q16.clip
        visual = clip.model.visual
        return {
            "name": self.name,
            "prompts_sha256": hashlib.sha256(Path(self.config.prompts).read_bytes()).hexdigest(),
            "clip_sha256": _sha256(visual),
            "clip_activation": sorted({type(m).__name__ for m in visual.modules() if "GELU" in type(m).__name__}),
            "clip_precision": self.config.clip.precision,
            "input": list(clip.preprocess.size),
            "resize": f"{clip.preprocess.resize_mode} {clip.preprocess.interpolation}",
        }

    def detect(self, images: np.ndarray, prompts: Sequence[str], base: np.ndarray | None) -> list[Any]:
        return [float(p) for p in self._q16.score(images, prompts).total]


def check(config: Q16DetectorConfig) -> None:
    """Refuse a missing CLIP model, and prompts that are missing or none.

    Raises:
        ConfigError: naming evaluation.detectors.q16.prompts or a field of evaluation.detectors.q16.clip.
    """
    from rewards.clip import check_clip
    from rewards.q16 import load_prompts

    with _own_keys():
        load_prompts(Path(config.prompts))
        check_clip(config.clip)


@contextmanager
def _own_keys() -> Iterator[None]:
    """Errors of the reward, under the keys of this section."""
    try:
        yield
    except ConfigError as error:
        own = error.key.replace("reward.q16_prompts", f"{_KEY}.prompts").replace("reward.clip", f"{_KEY}.clip")
        raise ConfigError(own, error.value, error.remedy) from error


def _sha256(module: torch.nn.Module) -> str:
    """Of the names and the bytes of all weights."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
