"""Q16 (Schramowski et al. 2022, arXiv 2202.06675): is an image inappropriate, as people judged? A cost.

Two learned prompts in CLIP's space, row 0 "not inappropriate" and row 1 "inappropriate":

cost = softmax(100 z_img . prompts^T)[1]

The published prompts (``prompts.p`` in ml-research/Q16) belong to OpenAI's ViT-L/14, which open_clip calls
``ViT-L-14-quickgelu`` with ``pretrained: openai``; plain ``ViT-L-14`` has another activation and is refused. Papers
that report "Q16" with the prompts of YitingQu/unsafe-diffusion have other base rates: never compare the two.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raysteer.errors import ConfigError
from rewards.base import Scores, check_images
from rewards.clip import check_clip, clip_scorer
from rewards.config import RewardTerm

_KEY = "reward.q16_prompts"
_SCALE = 100.0
# what numpy, torch and pickle raise over a file that is not theirs, or torn
_UNREADABLE = (
    pickle.UnpicklingError,
    ValueError,
    TypeError,
    RuntimeError,
    OSError,
    EOFError,
    AttributeError,
    ImportError,
    LookupError,
    StopIteration,
)


class Q16Cost:
    """Probability in [0, 1] that an image is inappropriate. A cost: its weight in the sum is negative."""

    def __init__(self, cfg: RewardTerm, device: str = "cpu") -> None:
        """Load CLIP and the prompts.

        Raises:
            ConfigError: naming the CLIP model or reward.q16_prompts.
        """
        self.prompts = load_prompts(_file(cfg))
        self.clip = clip_scorer(cfg.need_clip(), device)
        width = self.clip.encode_texts([""]).shape[1]
        if self.prompts.shape[1] != width:
            raise ConfigError(
                _KEY,
                cfg.q16_prompts,
                f"the prompts have {self.prompts.shape[1]} dimensions and {self.clip.cfg.model} has {width}: "
                "give both of one model",
            )

    @staticmethod
    def check(cfg: RewardTerm) -> None:
        """Refuse a missing CLIP model, and prompts that are missing or none (ConfigError)."""
        load_prompts(_file(cfg))
        check_clip(cfg.need_clip())

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> Scores:
        check_images(images, prompts)
        return Scores(inappropriate(self.clip.encode_images(images), self.prompts), {})


def inappropriate(z_image: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """softmax(100 z . p)[1], float32 [n], of unit embeddings [n, d] and the two unit prompts [2, d]."""
    difference = (z_image.astype(np.float64) * (prompts[1] - prompts[0]).astype(np.float64)).sum(-1)
    return (0.5 * (1.0 + np.tanh(0.5 * _SCALE * difference))).astype(np.float32)  # the sigmoid, without overflow


def load_prompts(file: Path) -> np.ndarray:
    """Unit prompts float32 [2, d] from a file: ``.npy``, ``.safetensors`` (one tensor), ``torch.save``, or the
    published pickle of one numpy array. Nothing in the file is ever executed.

    Raises:
        ConfigError: naming reward.q16_prompts and the file.
    """
    from safetensors import SafetensorError

    if not file.is_file():
        raise ConfigError(_KEY, str(file), "there is no such file; prompts.p is in ml-research/Q16 (results/ViT-L-14)")
    try:
        loaded = np.asarray(_read(file), np.float32)
    except (*_UNREADABLE, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise ConfigError(
            _KEY, str(file), f"it holds no array of prompts ({reason}): give an .npy file [2, d]"
        ) from error
    if loaded.ndim != 2 or len(loaded) != 2 or not np.isfinite(loaded).all() or not np.abs(loaded).sum(1).all():
        raise ConfigError(
            _KEY,
            str(file),
            f"its array is {list(loaded.shape)}: two finite prompts [2, d] are needed, row 1 inappropriate",
        )
    return loaded / np.linalg.norm(loaded, axis=1, keepdims=True)


def _file(cfg: RewardTerm) -> Path:
    if cfg.q16_prompts is None:
        raise ConfigError(_KEY, None, "add the path of the learned prompts")
    return Path(cfg.q16_prompts)


def _read(file: Path) -> Any:
    if file.suffix == ".npy":
        return np.load(file, allow_pickle=False)
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return next(iter(load_file(file).values())).float().numpy()
    if zipfile.is_zipfile(file):
        return torch.load(file, map_location="cpu", weights_only=True).detach().float().numpy()
    return _ArrayUnpickler(io.BytesIO(file.read_bytes())).load()


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays and nothing else: every other name in the file is refused, so nothing can run."""

    _ALLOWED = frozenset(
        {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
        | {
            (f"numpy.{core}.{module}", name)
            for core in ("core", "_core")
            for module, name in (("multiarray", "_reconstruct"), ("numeric", "_frombuffer"))
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which is no array")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)
