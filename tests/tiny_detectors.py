"""Random-weight detectors small enough for a test, saved in the very forms in which a user has the real ones."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import torch

from evaluation.detectors.objects import CLASSES
from tests.tiny import shared_folder

#: COCO's classes as checkpoints on the hub have them
LABELS = [{"couch": "sofa", "tv": "tvmonitor", "computer mouse": "mouse"}.get(name, name) for name in CLASSES]


def build_tiny_mask2former(folder: Path, labels: list[str] = LABELS) -> Path:
    """Save a random Mask2Former with its processor, sure enough of some classes to see them everywhere."""
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    stages = [f"stage{number}" for number in range(1, 5)]
    swin = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2, out_features=stages)
    size = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "dim_feedforward": 32, "num_queries": 12}
    depth = {"encoder_layers": 1, "decoder_layers": 2, "encoder_feedforward_dim": 32, "num_attention_heads": 4}
    config = Mask2FormerConfig(backbone_config=swin, id2label=dict(enumerate(labels)), **size, **depth)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Mask2FormerForUniversalSegmentation(config)
        model.class_predictor.weight.data.normal_(0.0, 1.0)
    model.eval().save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 384, "width": 384}).save_pretrained(folder)
    return folder


def build_random_inception(file: Path) -> Path:
    """Save the network of FID, in full size and random, in the form in which the real one is published. Needs
    torch-fidelity.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Random(FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *given: Any, **options: Any) -> Any:
            for module in self.modules():
                if isinstance(module, torch.nn.Conv2d):
                    torch.nn.init.kaiming_normal_(module.weight)

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Random("inception-v3-compat", ["2048"], feature_extractor_weights_path=nothing)
    torch.save(network.state_dict(), file)
    return file


@functools.cache
def tiny_mask2former() -> Path:
    """The tiny Mask2Former, built once per test process. Read it, never change it."""
    return build_tiny_mask2former(shared_folder() / "mask2former")


@functools.cache
def random_inception() -> Path:
    """The random Inception, built once per test process. Read it, never change it."""
    return build_random_inception(shared_folder() / "inception.pth")
