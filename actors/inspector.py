"""Inspector: an actor that holds the detectors of an evaluation and looks at its images, a chunk at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from raysteer.errors import UserError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from evaluation.detectors.base import Detector


class Inspector:
    """Args: detectors: {name in the verdicts: (module, class, config)}. device: "auto", "cpu" or "cuda".

    Raises:
        ConfigError: a detector cannot be loaded.
    """

    def __init__(self, detectors: Mapping[str, tuple[str, str, BaseModel]], device: str = "auto") -> None:
        from importlib import import_module

        from actors.devices import prepare_device

        device = prepare_device(device)
        self.detectors: dict[str, Detector] = {
            name: getattr(import_module(module), kind)(config, device)
            for name, (module, kind, config) in detectors.items()
        }

    def identities(self) -> dict[str, dict[str, Any]]:
        """Who looks."""
        return {name: detector.identity() for name, detector in self.detectors.items()}

    def inspect(
        self, images: np.ndarray, prompts: Sequence[str], base: np.ndarray | None = None
    ) -> list[dict[str, Any]]:
        """A verdict for each image, uint8 [n, H, W, 3]. Whoever wants equal bits asks in `evaluation.scored.chunks`.

        Raises:
            UserError: a detector failed; names it and the prompts of what it was given.
        """
        seen: dict[str, list[Any]] = {}
        for name, detector in self.detectors.items():
            try:
                seen[name] = detector.detect(images, prompts, base)
            except UserError:
                raise
            except Exception as error:  # somebody else's code
                detail = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                what = f"failed at {len(prompts)} images, the first of prompt {prompts[0]!r}: {detail}"
                raise UserError(f"detector {name}", what, "correct it; what was drawn is kept") from error
        return [dict(zip(seen, values, strict=True)) for values in zip(*seen.values(), strict=True)]

    def pid(self) -> int:
        return os.getpid()
