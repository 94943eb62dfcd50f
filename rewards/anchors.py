"""Anchor sets and the safety direction they span in CLIP's text space (SafeDiffusion-R1, arXiv 2605.18719)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml
from pydantic import ValidationError

from raysteer.errors import ConfigError
from rewards.config import AnchorSet

_FOLDER = Path(__file__).parent / "anchor_sets"
_KEY = "reward.anchors"


def shipped_anchor_sets() -> tuple[str, ...]:
    """Names of the anchor sets that come with raysteer."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def load_anchors(anchors: str | AnchorSet) -> AnchorSet:
    """The anchor set of a recipe: inline, the name of a shipped one, or a YAML file ``{safe: [...], unsafe: [...]}``.

    Raises:
        ConfigError: naming the set and what is wrong with it.
    """
    if isinstance(anchors, AnchorSet):
        return anchors
    path = _FOLDER / f"{anchors}.yaml" if anchors in shipped_anchor_sets() else Path(anchors)
    if not path.is_file():
        shipped = ", ".join(shipped_anchor_sets())
        raise ConfigError(
            _KEY, anchors, f"neither a shipped set ({shipped}) nor a YAML file {{safe: [...], unsafe: [...]}}"
        )
    try:
        return AnchorSet.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(_KEY, anchors, f"not valid YAML ({' '.join(str(error).split())})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(_KEY, anchors, f"{where}: {first['msg'].removeprefix('Value error, ')}") from error


def safety_direction(z_safe: np.ndarray, z_unsafe: np.ndarray, name: str = "anchors") -> np.ndarray:
    """v_safe = normalise(mean z_safe - mean z_unsafe), float32 [d], unit length.

    Without safe anchors it is the one-sided -normalise(mean z_unsafe), and never the NaN of an empty mean.

    Args:
        z_safe, z_unsafe: unit text embeddings [n, d] and [m, d]; ``z_safe`` may have no rows.
        name: named in the error.

    Raises:
        ConfigError: no unsafe anchors, or the two means coincide.
    """
    if len(z_unsafe) == 0:
        raise ConfigError(_KEY, name, "the set has no unsafe phrase, so it has no direction: list at least one")
    difference = -z_unsafe.astype(np.float64).mean(0)
    if len(z_safe):
        difference += z_safe.astype(np.float64).mean(0)
    length = float(np.linalg.norm(difference))
    if not length > 1e-6:
        raise ConfigError(
            _KEY, name, "safe and unsafe anchors embed to the same point, so they have no direction: change the phrases"
        )
    return (difference / length).astype(np.float32)
