"""A dual encoder of texts and images, whose answers do not depend on batching.

Images are encoded in chunks of one fixed shape (short ones are padded), texts one at a time and then cached: the
kernels a matrix product picks depend on its shape, so only a fixed shape gives the same bits for a batch of one and of
a thousand.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from raysteer.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CACHED_TEXTS = 8192  # 1024 floats each at most: 32 MiB


class Encoder(ABC):
    """Unit embeddings of texts and images; a subclass says how one text and one chunk of pixels are embedded.

    Args:
        device: where the model is.
        batch_size: images per forward, always; shorter chunks are padded.
        preprocess: uint8 [n, H, W, 3] -> float32 [n, 3, h, w].
        dtype: of the pixels the model takes.
    """

    def __init__(self, device: torch.device, batch_size: int, preprocess: Preprocess, dtype: torch.dtype) -> None:
        self.device, self.batch_size, self.preprocess, self.dtype = device, batch_size, preprocess, dtype
        self._texts: OrderedDict[str, np.ndarray] = OrderedDict()
        self._remembering = 0
        self._seen: tuple[np.ndarray, np.ndarray] | None = None

    @abstractmethod
    def _embed_text(self, text: str) -> torch.Tensor:
        """[1, d] of one text, of any length and dtype."""

    @abstractmethod
    def _embed_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """[n, d] of preprocessed images, of any length and dtype."""

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit embeddings float32 [n, d]; cached per text, least recently used out first."""
        return np.stack([self._encode_text(text) for text in texts])

    @torch.no_grad()
    def _encode_text(self, text: str) -> np.ndarray:
        z = self._texts.get(text)
        if z is None:
            z = self._texts[text] = unit(self._embed_text(text))[0]
            if len(self._texts) > _CACHED_TEXTS:
                self._texts.popitem(last=False)
        self._texts.move_to_end(text)
        return z

    @torch.no_grad()
    def encode_images(self, images: np.ndarray) -> np.ndarray:
        """Unit embeddings float32 [n, d] of uint8 images [n, H, W, 3]."""
        if self._remembering and self._seen is not None and self._seen[0] is images:
            return self._seen[1]
        chunks = []
        for start in range(0, len(images), self.batch_size):
            chunk = images[start : start + self.batch_size]
            padded = np.zeros((self.batch_size, *images.shape[1:]), np.uint8)
            padded[: len(chunk)] = chunk
            pixels = self.preprocess(torch.from_numpy(padded).to(self.device)).to(self.dtype)
            chunks.append(unit(self._embed_pixels(pixels))[: len(chunk)])
        z = np.concatenate(chunks)
        if self._remembering:
            self._seen = images, z
        return z

    @contextmanager
    def remember(self) -> Iterator[None]:
        """Inside, the very same array is not encoded again: for several rewards over one model. It must not change."""
        self._remembering += 1
        try:
            yield
        finally:
            self._remembering -= 1
            if not self._remembering:
                self._seen = None


class Preprocess:
    """Resize, crop and normalise a batch of tensors, as the evaluation transforms of open_clip and transformers do.

    Args:
        cfg: a model's own ``preprocess_cfg`` (size, mean, std, interpolation, resize_mode, fill_color).
        key: of the recipe, named in the error.

    Raises:
        ConfigError: a kind of resizing that we do not have.
    """

    def __init__(self, cfg: dict[str, Any], key: str = "reward.clip.model") -> None:
        size = cfg["size"]
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.mean = torch.tensor(cfg["mean"]).view(1, 3, 1, 1)
        self.std = torch.tensor(cfg["std"]).view(1, 3, 1, 1)
        self.interpolation = cfg.get("interpolation", "bicubic")
        self.resize_mode = cfg.get("resize_mode", "shortest")
        self.fill = cfg.get("fill_color", 0)
        modes = ("shortest", "squash", "longest")
        if self.interpolation not in ("bicubic", "bilinear") or self.resize_mode not in modes:
            raise ConfigError(
                key,
                f"preprocess {self.resize_mode}/{self.interpolation}",
                "use a model with bicubic or bilinear resizing (shortest, longest or squash)",
            )

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """float32 [n, 3, h, w] of uint8 [n, H, W, 3]."""
        x = images.permute(0, 3, 1, 2).float()
        h, w = x.shape[-2:]
        H, W = self.size
        if self.resize_mode == "squash":
            new = (H, W)
        else:
            ratios = (H / h, W / w)
            scale = max(ratios) if self.resize_mode == "shortest" else min(ratios)
            # int(), as torchvision does for the longer side
            new = (H if ratios[0] == scale else int(h * scale), W if ratios[1] == scale else int(w * scale))
        if new != (h, w):
            x = F.interpolate(x, size=new, mode=self.interpolation, antialias=True, align_corners=False)
            x = x.round().clamp(0, 255)  # as PIL, which resizes in 8 bits
        x = _center(x, self.size, float(self.fill))
        return (x / 255 - self.mean.to(x.device)) / self.std.to(x.device)


def _center(x: torch.Tensor, size: tuple[int, int], fill: float) -> torch.Tensor:
    """Crop or pad [n, 3, h, w] about its centre."""
    pad_h, pad_w = max(size[0] - x.shape[-2], 0), max(size[1] - x.shape[-1], 0)
    if pad_h or pad_w:
        x = F.pad(x, (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2), value=fill)
    top, left = round((x.shape[-2] - size[0]) / 2), round((x.shape[-1] - size[1]) / 2)
    return x[..., top : top + size[0], left : left + size[1]]


def unit(z: torch.Tensor) -> np.ndarray:
    """float32 rows of length 1, on the host."""
    return F.normalize(z.float(), dim=-1).cpu().numpy()


def rowwise_dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float32 [n] of two float32 [n, d]; each row is summed alone, so its bits do not depend on n."""
    return (a * b).sum(-1)
