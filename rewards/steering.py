"""The steering reward of SafeDiffusion-R1 (arXiv 2605.18719): align images with the prompt moved towards safety.

z~ = normalise(z_prompt + alpha v_safe),  r = z_img . z~

Inside a group the prompt is fixed, so after group normalisation this is alignment plus alpha times the linear image
safety z_img . v_safe; both are reported as parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from rewards.anchors import load_anchors, safety_direction
from rewards.base import Scores, check_images
from rewards.clip import check_clip, clip_scorer
from rewards.config import AnchorSet, RewardTerm
from rewards.encoder import Encoder, rowwise_dot


class SteeringReward:
    """Cosine of image and steered prompt.

    Attributes:
        v_safe: float32 [d], unit length, from unsafe to safe.
    """

    def __init__(self, cfg: RewardTerm, device: str = "cpu") -> None:
        """Load CLIP and embed the anchors.

        Raises:
            ConfigError: naming the anchors or the CLIP model.
        """
        self.cfg = cfg
        self.clip = clip_scorer(cfg.need_clip(), device)
        name = cfg.anchors if isinstance(cfg.anchors, str) else "the recipe's own set"
        self.v_safe = embed_direction(self.clip, load_anchors(cfg.anchors), name)

    @staticmethod
    def check(cfg: RewardTerm) -> None:
        """Refuse anchors without a direction and a CLIP model that is not there (ConfigError)."""
        load_anchors(cfg.anchors)
        check_clip(cfg.need_clip())

    def steered(self, prompt: str) -> np.ndarray:
        """The unit text embedding [d] this prompt's images are compared with."""
        z_text = self.clip.encode_texts([prompt])[0]
        if self.cfg.steer == "unsafe" and not float(z_text @ self.v_safe) < 0.0:
            return z_text
        return steer(z_text, self.v_safe, self.cfg.alpha, self.cfg.mode)

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> Scores:
        check_images(images, prompts)
        z_image = self.clip.encode_images(images)
        steered = {prompt: self.steered(prompt) for prompt in dict.fromkeys(prompts)}
        return Scores(
            total=rowwise_dot(z_image, np.stack([steered[prompt] for prompt in prompts])),
            parts={
                "alignment": rowwise_dot(z_image, self.clip.encode_texts(prompts)),
                "image_safety": rowwise_dot(z_image, self.v_safe[None]),
            },
        )


def embed_direction(clip: Encoder, anchors: AnchorSet, name: str = "anchors") -> np.ndarray:
    """The safety direction [d] that an anchor set spans in the text space of a model.

    Raises:
        ConfigError: naming the set, when both its sides embed to the same point.
    """
    z_unsafe = clip.encode_texts(anchors.unsafe)
    z_safe = clip.encode_texts(anchors.safe) if anchors.safe else np.zeros((0, z_unsafe.shape[1]), np.float32)
    return safety_direction(z_safe, z_unsafe, name)


def steer(z_text: np.ndarray, v_safe: np.ndarray, alpha: float, mode: Literal["translate", "project"]) -> np.ndarray:
    """Move a unit embedding [d] along the unit direction ``v_safe`` [d]; unit length again.

    ``translate`` adds alpha v_safe; ``project`` first removes the component along v_safe, so that every prompt ends up
    with the same one. Translating by 0 returns the embedding itself, bit for bit.
    """
    if mode == "translate" and alpha == 0.0:
        return z_text
    z, v = z_text.astype(np.float64), v_safe.astype(np.float64)
    if mode == "project":
        z = z - (z @ v) * v
    z = z + alpha * v
    length = np.linalg.norm(z)
    if not length > 1e-6:  # alpha v cancels the prompt: nothing is left to align with but safety itself
        return v_safe
    return (z / length).astype(np.float32)


def kept_cosine(side: np.ndarray, alpha: float, mode: Literal["translate", "project"]) -> np.ndarray:
    """Cosine of unit embeddings to themselves after ``steer``: 1 = not moved. Needs only their sides.

    Args:
        side: z_text . v_safe, any shape.

    Returns:
        float64 of that shape.
    """
    s = np.asarray(side, np.float64)
    if mode == "project":
        along, length = 1.0 - s * s + alpha * s, np.sqrt(np.maximum(1.0 - s * s + alpha * alpha, 0.0))
    else:
        along, length = 1.0 + alpha * s, np.sqrt(np.maximum(1.0 + 2.0 * alpha * s + alpha * alpha, 0.0))
    return np.where(length > 1e-6, along / np.maximum(length, 1e-6), s)
