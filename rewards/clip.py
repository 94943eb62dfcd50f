"""An open_clip model as an ``Encoder``: any architecture and checkpoint, HPS v2.1 included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from raysteer.errors import ConfigError
from rewards.config import ClipConfig, looks_like_path
from rewards.encoder import DTYPES, Encoder, Preprocess
from rewards.statedict import architecture, check_state_dict

_LOCAL = "local-dir:"
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")
_scorers: WeakValueDictionary[tuple[ClipConfig, str], ClipScorer] = WeakValueDictionary()


def clip_scorer(cfg: ClipConfig, device: str = "cpu") -> ClipScorer:
    """The scorer of a model, loaded once per process for as long as some reward holds it.

    Raises:
        ConfigError: as ``ClipScorer``.
    """
    scorer = _scorers.get((cfg, device))
    if scorer is None:
        scorer = _scorers[cfg, device] = ClipScorer(cfg, device)
    return scorer


class ClipScorer(Encoder):
    """Normalised text and image embeddings of an open_clip model (Radford et al. 2021)."""

    def __init__(self, cfg: ClipConfig, device: str = "cpu") -> None:
        """Load the model.

        Raises:
            ConfigError: naming reward.clip.model or reward.clip.pretrained.
        """
        self.cfg = cfg
        self.model, self._tokenizer = _load(cfg, torch.device(device))
        preprocess = Preprocess(self.model.visual.preprocess_cfg)
        super().__init__(torch.device(device), cfg.batch_size, preprocess, DTYPES[cfg.precision])

    def _embed_text(self, text: str) -> torch.Tensor:
        return self.model.encode_text(self._tokenizer([text]).to(self.device))

    def _embed_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.encode_image(pixels)


def check_clip(cfg: ClipConfig) -> None:
    """Everything about a CLIP model that can be wrong without loading it (a cheap preflight).

    Raises:
        ConfigError: naming reward.clip.model or reward.clip.pretrained.
    """
    if cfg.model.startswith(_LOCAL):
        _check_folder(cfg.model)
    elif not cfg.model.startswith("hf-hub:"):
        _check_named(cfg)


def clip_parameters(cfg: ClipConfig) -> int | None:
    """How many parameters the model has, without loading it; None when that would take the hub or a look at its files
    fails.
    """
    try:
        model = None if cfg.model.startswith("hf-hub:") else architecture(cfg.model)
    except (RuntimeError, ValueError, OSError):
        return None  # the preflight names what is wrong
    return None if model is None else sum(parameter.numel() for parameter in model.parameters())


def _check_folder(model: str) -> None:
    key, folder = "reward.clip.model", Path(model.removeprefix(_LOCAL))
    if not folder.is_dir():
        raise ConfigError(key, model, "no such folder; it must hold open_clip_config.json and the weights")
    try:
        complete = "model_cfg" in json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        complete = False
    if not complete:
        raise ConfigError(key, model, "the folder needs an open_clip_config.json with a model_cfg entry")
    weights = [file for pattern in _WEIGHTS for file in sorted(folder.glob(pattern))]
    if not weights:
        raise ConfigError(key, model, "the folder holds no weights (open_clip_model.safetensors)")
    if len(weights) == 1:  # of several, open_clip chooses
        check_state_dict(model, weights[0], key)


def _check_named(cfg: ClipConfig) -> None:
    import open_clip

    key, model, pretrained = "reward.clip.pretrained", cfg.model, cfg.pretrained or ""
    if model not in open_clip.list_models():
        raise ConfigError(
            "reward.clip.model", model, "use a name of open_clip.list_models() (as ViT-H-14), or local-dir:/folder"
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained in tags:
        # open_clip only warns, and embeds with the wrong activation
        trained_quick = bool(open_clip.get_pretrained_cfg(model, pretrained).get("quick_gelu"))
        if trained_quick and not (open_clip.get_model_config(model) or {}).get("quick_gelu"):
            raise ConfigError(
                "reward.clip.model", model, f"{pretrained} was trained with another GELU: use {model}-quickgelu"
            )
    elif Path(pretrained).is_file():
        check_state_dict(model, Path(pretrained), key)
    elif looks_like_path(pretrained):
        raise ConfigError(key, pretrained, "there is no such weights file")
    else:
        raise ConfigError(key, pretrained, f"use a weights file or one of: {', '.join(tags) or 'no tags known'}")


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
