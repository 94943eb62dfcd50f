"""PickScore (Kirstain et al. 2023, arXiv 2305.01569): a transformers CLIPModel tuned on people's picks.

r = exp(logit_scale) z_img . z_prompt

This is the raw score as published, not the cosine: the model's learned scale (about 100) is part of it, so values are
about 17 to 24. Other code bases divide by 26 to come near 1: write ``weight: 0.0385`` for that, or mix by group.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raysteer.errors import ConfigError
from rewards.base import Scores, check_images
from rewards.config import PickScoreConfig, RewardTerm
from rewards.encoder import DTYPES, Encoder, Preprocess, rowwise_dot

_KEY = "reward.pickscore"
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


class PickScoreReward:
    """The raw PickScore; "pickscore" in the parts."""

    def __init__(self, cfg: RewardTerm, device: str = "cpu") -> None:
        """Load the model.

        Raises:
            ConfigError: naming reward.pickscore.model or reward.pickscore.processor.
        """
        self.encoder = TransformersClip(_own(cfg), device)

    @staticmethod
    def check(cfg: RewardTerm) -> None:
        """Refuse a model or tokenizer that is not there, or a folder that holds no CLIPModel (ConfigError)."""
        check_files(_own(cfg))

    def score(self, images: np.ndarray, prompts: Sequence[str]) -> Scores:
        check_images(images, prompts)
        cosine = rowwise_dot(self.encoder.encode_images(images), self.encoder.encode_texts(prompts))
        return Scores(cosine * self.encoder.scale, {})


class TransformersClip(Encoder):
    """Unit embeddings of a transformers ``CLIPModel``.

    Attributes:
        scale: float32, exp(logit_scale).
    """

    def __init__(self, cfg: PickScoreConfig, device: str = "cpu") -> None:
        check_files(cfg)
        dtype = DTYPES[cfg.precision]
        self.model, self.tokenizer = _load(cfg, dtype)
        self.model.to(device)
        self.scale = np.float32(self.model.logit_scale.detach().float().exp().item())
        super().__init__(torch.device(device), cfg.batch_size, Preprocess(_preprocess_cfg(cfg), f"{_KEY}.model"), dtype)

    def _embed_text(self, text: str) -> torch.Tensor:
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer([text], truncation=True, max_length=limit, return_tensors="pt").to(self.device)
        return self.model.get_text_features(**tokens).pooler_output

    def _embed_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values=pixels).pooler_output


def check_files(cfg: PickScoreConfig) -> None:
    """Refuse what cannot be a CLIPModel with its tokenizer, without loading either.

    Raises:
        ConfigError: naming reward.pickscore.model or reward.pickscore.processor.
    """
    config = find_file(cfg.model, "config.json", f"{_KEY}.model")
    try:
        described = json.loads(config.read_text(encoding="utf-8")) if config is not None else {}
    except ValueError as error:
        raise ConfigError(f"{_KEY}.model", cfg.model, f"its config.json is not valid JSON ({error})") from None
    if not isinstance(described, dict) or described.get("model_type") != "clip":
        raise ConfigError(
            f"{_KEY}.model", cfg.model, "it holds no transformers CLIPModel (config.json with model_type clip)"
        )
    weights = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    if not any(find_file(cfg.model, name, f"{_KEY}.model") for name in weights):
        raise ConfigError(f"{_KEY}.model", cfg.model, "it holds no weights (model.safetensors)")
    where, key = _processor(cfg)
    if not any(find_file(where, name, key) for name in ("tokenizer.json", "vocab.json")):
        raise ConfigError(
            f"{_KEY}.processor",
            cfg.processor,
            f"{where} holds no tokenizer: name a folder or hub model that does "
            "(PickScore's is laion/CLIP-ViT-H-14-laion2B-s32B-b79K)",
        )


def find_file(model: str, name: str, key: str) -> Path | None:
    """A file of a model folder, or of a hub model in the local cache; None when the model has no such file.

    Raises:
        ConfigError: naming ``key``, when the model itself is nowhere.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    folder = Path(model)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    remedy = f"there is no such folder, nor is it in the local hub cache; try: hf download {model}"
    try:
        found = try_to_load_from_cache(model, name)
        known = isinstance(found, str) or isinstance(try_to_load_from_cache(model, "config.json"), str)
    except HFValidationError:
        known, found, remedy = False, None, "there is no such folder"
    if not known:
        raise ConfigError(key, model, remedy)
    return Path(found) if isinstance(found, str) else None


def _own(cfg: RewardTerm) -> PickScoreConfig:
    if cfg.pickscore is None:
        raise ConfigError(_KEY, None, "add pickscore: {model: /models/PickScore_v1}")
    return cfg.pickscore


def _processor(cfg: PickScoreConfig) -> tuple[str, str]:
    """Folder or hub name of tokenizer and preprocessor, and the key that names it."""
    return (cfg.model, f"{_KEY}.model") if cfg.processor is None else (cfg.processor, f"{_KEY}.processor")


def _load(cfg: PickScoreConfig, dtype: torch.dtype) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoTokenizer, CLIPModel

    where, key = _processor(cfg)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=True)
        key, where = f"{_KEY}.model", cfg.model
        model, report = CLIPModel.from_pretrained(
            cfg.model, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise ConfigError(key, where, f"it cannot be loaded ({reason}): download or save it again") from error
    # transformers would fill what is missing with random numbers, and say so only in a warning
    absent = sorted(report["missing_keys"])
    if absent:
        raise ConfigError(key, where, f"its weights are no whole CLIPModel ({absent[0]} is missing): give PickScore_v1")
    model.requires_grad_(False)
    return model.eval(), tokenizer


def _preprocess_cfg(cfg: PickScoreConfig) -> dict[str, Any]:
    """CLIP's own preprocessing at the model's image size, with whatever a preprocessor_config.json says otherwise."""
    where, key = _processor(cfg)
    config = find_file(cfg.model, "config.json", f"{_KEY}.model")
    size = json.loads(config.read_text(encoding="utf-8"))["vision_config"].get("image_size", 224) if config else 224
    file = find_file(where, "preprocessor_config.json", key)
    said = json.loads(file.read_text(encoding="utf-8")) if file is not None else {}
    resample = said.get("resample", 3)
    return {
        "size": size,
        "mean": said.get("image_mean", (0.48145466, 0.4578275, 0.40821073)),
        "std": said.get("image_std", (0.26862954, 0.26130258, 0.27577711)),
        "interpolation": _RESAMPLE.get(resample, str(resample)),
        "resize_mode": "shortest",
    }
