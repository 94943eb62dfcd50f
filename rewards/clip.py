"""A CLIP model as an encoder of texts and images, whose answers do not depend on batching.

Images are encoded in chunks of one fixed shape (short ones are padded), texts one at a time and then cached: the
kernels a matrix product picks depend on its shape, so only a fixed shape gives the same bits for a batch of one and of
a thousand.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from raysteer.errors import ConfigError
from rewards.config import ClipConfig

_CACHED_TEXTS = 8192  # 1024 floats each at most: 32 MiB
_LOCAL = "local-dir:"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ClipScorer:
    """Normalised text and image embeddings of an open_clip model (Radford et al. 2021)."""

    def __init__(self, cfg: ClipConfig, device: str = "cpu") -> None:
        """Load the model.

        Raises:
            ConfigError: naming reward.clip.model or reward.clip.pretrained.
        """
        self.cfg = cfg
        self.device = torch.device(device)
        self.model, self._tokenizer = _load(cfg, self.device)
        self._preprocess = Preprocess(self.model.visual.preprocess_cfg)
        self._texts: OrderedDict[str, np.ndarray] = OrderedDict()

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit embeddings float32 [n, d]; cached per text, least recently used out first."""
        return np.stack([self._encode_text(text) for text in texts])

    @torch.no_grad()
    def _encode_text(self, text: str) -> np.ndarray:
        z = self._texts.get(text)
        if z is None:
            tokens = self._tokenizer([text]).to(self.device)
            z = self._texts[text] = _unit(self.model.encode_text(tokens).float()).cpu().numpy()[0]
            if len(self._texts) > _CACHED_TEXTS:
                self._texts.popitem(last=False)
        self._texts.move_to_end(text)
        return z

    @torch.no_grad()
    def encode_images(self, images: np.ndarray) -> np.ndarray:
        """Unit embeddings float32 [n, d] of uint8 images [n, H, W, 3]."""
        chunks = []
        for start in range(0, len(images), self.cfg.batch_size):
            chunk = images[start : start + self.cfg.batch_size]
            padded = np.zeros((self.cfg.batch_size, *images.shape[1:]), np.uint8)
            padded[: len(chunk)] = chunk
            pixels = self._preprocess(torch.from_numpy(padded).to(self.device)).to(_DTYPES[self.cfg.precision])
            z = _unit(self.model.encode_image(pixels).float())
            chunks.append(z[: len(chunk)].cpu().numpy())
        return np.concatenate(chunks)


class Preprocess:
    """open_clip's evaluation transform on a batch of tensors: resize, crop, normalise.

    Args:
        cfg: the model's own ``preprocess_cfg`` (size, mean, std, interpolation, resize_mode, fill_color).
    """

    def __init__(self, cfg: dict[str, Any]) -> None:
        size = cfg["size"]
        self.size: tuple[int, int] = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.mean = torch.tensor(cfg["mean"]).view(1, 3, 1, 1)
        self.std = torch.tensor(cfg["std"]).view(1, 3, 1, 1)
        self.interpolation = cfg.get("interpolation", "bicubic")
        self.resize_mode = cfg.get("resize_mode", "shortest")
        self.fill = cfg.get("fill_color", 0)
        if self.interpolation not in ("bicubic", "bilinear") or self.resize_mode not in (
            "shortest",
            "squash",
            "longest",
        ):
            raise ConfigError(
                "reward.clip.model",
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


def _unit(z: torch.Tensor) -> torch.Tensor:
    return F.normalize(z, dim=-1)


def check_clip(cfg: ClipConfig) -> None:
    """Everything about a CLIP model that can be wrong without loading it (a cheap preflight).

    Raises:
        ConfigError: naming reward.clip.model or reward.clip.pretrained.
    """
    if cfg.model.startswith(_LOCAL):
        folder = Path(cfg.model.removeprefix(_LOCAL))
        file = folder / "open_clip_config.json"
        if not folder.is_dir():
            raise ConfigError("reward.clip.model", cfg.model, "no such folder")
        try:
            complete = "model_cfg" in json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            complete = False
        if not complete:
            raise ConfigError(
                "reward.clip.model", cfg.model, "the folder needs an open_clip_config.json with a model_cfg entry"
            )
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")) and not any(folder.glob("*.pt")):
            raise ConfigError(
                "reward.clip.model", cfg.model, "the folder holds no weights (open_clip_model.safetensors)"
            )
        return
    if cfg.model.startswith("hf-hub:"):
        return
    import open_clip

    if cfg.model not in open_clip.list_models():
        raise ConfigError(
            "reward.clip.model", cfg.model, "use a name of open_clip.list_models() (as ViT-H-14), or local-dir:/folder"
        )
    tags = open_clip.list_pretrained_tags_by_model(cfg.model)
    if cfg.pretrained is not None and cfg.pretrained not in tags and not Path(cfg.pretrained).is_file():
        raise ConfigError(
            "reward.clip.pretrained",
            cfg.pretrained,
            f"use a weights file or one of: {', '.join(tags) or 'no tags known'}",
        )


def _load(cfg: ClipConfig, device: torch.device) -> tuple[Any, Any]:
    import open_clip
    from safetensors import SafetensorError

    check_clip(cfg)
    try:
        model = open_clip.create_model(
            cfg.model,
            pretrained=cfg.pretrained,
            precision=cfg.precision,
            device=device,
            require_pretrained=True,
            weights_only=True,
        )
        tokenizer = open_clip.get_tokenizer(cfg.model)
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        key = "reward.clip.model" if cfg.pretrained is None else "reward.clip.pretrained"
        raise ConfigError(key, cfg.pretrained or cfg.model, f"the weights cannot be loaded ({reason})") from error
    model.requires_grad_(False)
    return model.eval(), tokenizer
