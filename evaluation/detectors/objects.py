"""The detector of GenEval (Ghosh et al. 2023, arXiv 2310.11513): objects of COCO's 80 classes, with boxes and colours.

Any Mask2Former for instances through transformers. An instance's score is the probability of its class times the mean
probability of its mask inside itself (Cheng et al. 2022), its box the bounds of its mask. As in the published
evaluation, an image is enlarged to 800 pixels on its shorter edge, 1333 at most on the longer, and filled up to a
multiple of 32; the checkpoints' own preprocessing would squash it to 384x384, which sees fewer small objects.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field, model_validator

from evaluation.detectors.clip import check_model
from evaluation.detectors.object_colours import MOST, ColourClassifier, names_colour
from raysteer.errors import ConfigError
from rewards.config import ClipConfig

KEY = "evaluation.detectors.objects"
_STRIDE = 32  # of the backbone
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")

_CLASSES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag,
tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse,
tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
teddy bear, hair drier, toothbrush
"""
CLASSES = tuple(name.strip() for name in _CLASSES.replace("\n", " ").split(","))
"""COCO's, as GenEval's prompts call them."""

#: what COCO, Pascal VOC and checkpoints call some of them
_ALIASES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "hair dryer": "hair drier",
}


def class_name(label: str) -> str | None:
    """The class that a label means; None when it is none of ``CLASSES``."""
    name = " ".join(label.lower().replace("_", " ").split())
    name = _ALIASES.get(name, name)
    return name if name in CLASSES else None


class ObjectsDetectorConfig(BaseModel, frozen=True, extra="forbid"):
    """Who looks for objects, and who says their colours.

    ``model`` is a folder or a hub name in the local cache (nothing is downloaded): a transformers Mask2Former whose
    labels include COCO's 80 classes. ``floor`` is the least score that is written down; it is at most 0.1, where the
    suites' thresholds begin. ``batch_size`` as in ``ClipConfig``. ``clip`` names the colours, of objects cut out of
    the image and laid on ``background``; the published evaluation means OpenAI's weights, which open_clip now calls
    ViT-L-14-quickgelu.
    """

    model: str = Field("facebook/mask2former-swin-small-coco-instance", min_length=1)
    shortest_edge: int = Field(800, ge=32)
    longest_edge: int = Field(1333, ge=32)
    floor: float = Field(0.05, gt=0.0, le=0.1)
    batch_size: int = Field(4, ge=1)
    clip: ClipConfig = ClipConfig(model="ViT-L-14-quickgelu", pretrained="openai")
    background: str = Field("#999999", pattern="^#[0-9a-fA-F]{6}$")

    @model_validator(mode="after")
    def _edges(self) -> ObjectsDetectorConfig:
        if self.longest_edge < self.shortest_edge:
            raise ValueError(
                f"longest_edge ({self.longest_edge}) must not be below shortest_edge ({self.shortest_edge})"
            )
        return self


class ObjectsDetector:
    """Each verdict is a list, highest score first, of {"class": one of ``CLASSES``, "score": in (floor, 1],
    "box": [x0, y0, x1, y1] in pixels of the image, ends exclusive, "colour", "colour_score"}.

    Colours are told where they can matter: of the 16 surest objects of each class, in images whose prompt names one of
    the ten colours as a word. Elsewhere "colour" and "colour_score" are None.
    """

    name = "objects"

    def __init__(self, config: ObjectsDetectorConfig, device: str = "cpu") -> None:
        """Load both models.

        Raises:
            ConfigError: naming evaluation.detectors.objects.model or its clip.
        """
        import torch

        check(config)
        self.config, self.device = config, torch.device(device)
        self.colours = ColourClassifier("objects.clip", config.clip, config.background, device)
        self.model = _load(config).to(self.device)
        labels = _json(config, "config.json")["id2label"]
        self._names = {int(index): class_name(str(label)) for index, label in labels.items()}
        self._normal = _json(config, "preprocessor_config.json")

    def identity(self) -> dict[str, Any]:
        """As of the other detectors, paths are left out: the weights decide."""
        import transformers

        from diffusion.adapters import checksum

        described = {k: v for k, v in _json(self.config, "config.json").items() if k not in _NOT_THE_MODEL}
        config = self.config
        return {
            "name": self.name,
            "version": 1,
            **_hub(config),
            "config_sha256": hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest(),
            "weights_sha256": checksum({k: v.cpu().numpy() for k, v in self.model.state_dict().items()}),
            "mean": self._normal["image_mean"],
            "std": self._normal["image_std"],
            "edges": [config.shortest_edge, config.longest_edge],
            "floor": config.floor,
            "transformers": transformers.__version__,
            "colours": self.colours.identity(),
        }

    def detect(self, images: np.ndarray, prompts: Sequence[str], base: np.ndarray | None) -> list[Any]:
        """See the class; the verdict of an image does not depend on the others."""
        size, verdicts = self.config.batch_size, []
        for start in range(0, len(images), size):
            chunk = images[start : start + size]
            for image, prompt, found in zip(chunk, prompts[start : start + size], self._instances(chunk), strict=True):
                verdicts.append(self._verdict(image, prompt, *found))
        return verdicts

    def _verdict(self, image: np.ndarray, prompt: str, scores: Any, labels: Any, masks: Any) -> list[dict[str, Any]]:
        objects: list[dict[str, Any]] = []
        shown: list[np.ndarray] = []
        for score, label, mask in zip(scores.tolist(), labels.tolist(), masks, strict=True):
            name = self._names.get(label)
            if name is not None:
                own = {"class": name, "score": round(score, 6), "box": box(mask), "colour": None, "colour_score": None}
                objects.append(own)
                shown.append(mask)
        if names_colour(prompt):
            self._tell_colours(image, objects, shown)
        return objects

    def _tell_colours(self, image: np.ndarray, objects: list[dict[str, Any]], masks: list[np.ndarray]) -> None:
        nth: dict[str, int] = {}
        chosen = []
        for index, found in enumerate(objects):
            nth[found["class"]] = nth.get(found["class"], 0) + 1
            if nth[found["class"]] <= MOST:
                chosen.append(index)
        told = self.colours.classify(image, [(objects[i]["class"], objects[i]["box"], masks[i]) for i in chosen])
        for index, (colour, probability) in zip(chosen, told, strict=True):
            objects[index] |= {"colour": colour, "colour_score": round(probability, 6)}

    def _instances(self, images: np.ndarray) -> list[tuple[Any, Any, Any]]:
        """(scores, labels, masks) of each image, see ``instances``."""
        import torch
        from torch.nn import functional as F

        from rewards.encoder import Preprocess

        height, width = images.shape[1:3]
        inner = scaled(height, width, self.config.shortest_edge, self.config.longest_edge)
        outer = tuple(-(-edge // _STRIDE) * _STRIDE for edge in inner)
        padded = np.zeros((self.config.batch_size, *images.shape[1:]), np.uint8)  # one shape, so the same bits
        padded[: len(images)] = images
        own = {"size": inner, "mean": self._normal["image_mean"], "std": self._normal["image_std"]}
        enlarge = Preprocess({**own, "interpolation": "bilinear", "resize_mode": "squash"}, f"{KEY}.model")
        with torch.no_grad():
            pixels = enlarge(torch.from_numpy(padded).to(self.device))
            pixels = F.pad(pixels, (0, outer[1] - inner[1], 0, outer[0] - inner[0]))
            seen = self.model(pixel_values=pixels)
            return [
                instances(
                    seen.class_queries_logits[i],
                    seen.masks_queries_logits[i],
                    (outer, inner, (height, width)),
                    self.config.floor,
                )
                for i in range(len(images))
            ]


def scaled(height: int, width: int, shortest: int, longest: int) -> tuple[int, int]:
    """Height and width with the shorter edge at `shortest`, or less where the longer one would exceed `longest`."""
    scale = min(shortest / min(height, width), longest / max(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def instances(
    class_logits: Any, mask_logits: Any, sizes: tuple[tuple[int, ...], tuple[int, int], tuple[int, int]], floor: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Instances with a score above `floor`, highest first, as Mask2Former's authors tell them.

    Args:
        class_logits: float [queries, classes + 1], the last of no object.
        mask_logits: float [queries, h, w].
        sizes: (height, width) of what the model saw, of the part of it that is the image, and of the image itself.
        floor: scores at or below it are left out.

    Returns:
        float scores [n], int labels [n], bool masks [n, height, width]; never an empty mask.
    """
    from torch.nn import functional as F

    outer, inner, size = sizes
    classes = class_logits.shape[-1] - 1
    likely = class_logits.float().softmax(-1)[:, :-1].flatten()
    top, at = likely.topk(min(len(class_logits), len(likely)))  # a query may be several classes
    top, at = top[top > floor], at[top > floor]  # the mask's part can only lower a score
    logits = mask_logits[at // classes].float()[:, None]
    if not len(logits):
        return np.zeros(0), np.zeros(0, int), np.zeros((0, *size), bool)
    logits = F.interpolate(logits, size=outer, mode="bilinear", align_corners=False)[..., : inner[0], : inner[1]]
    logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False).flatten(1)
    inside = (logits > 0).float()
    area = inside.sum(1)
    scores = top * (logits.sigmoid() * inside).sum(1) / (area + 1e-6)
    order = scores.argsort(descending=True, stable=True)
    order = order[(scores[order] > floor) & (area[order] > 0)]
    masks = inside[order].bool().view(len(order), *size)
    return scores[order].cpu().numpy(), (at % classes)[order].cpu().numpy(), masks.cpu().numpy()


def box(mask: np.ndarray) -> list[int]:
    """[x0, y0, x1, y1] of a mask, bool [H, W] and not empty; ends exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def check(config: ObjectsDetectorConfig) -> None:
    """Refuse what is no Mask2Former of COCO's classes, or no CLIP.

    Raises:
        ConfigError: naming evaluation.detectors.objects.model or its clip.
    """
    from rewards.pickscore import find_file

    key = f"{KEY}.model"
    described = _json(config, "config.json")
    if described.get("model_type") != "mask2former":
        raise ConfigError(key, config.model, "it holds no Mask2Former (config.json with model_type mask2former)")
    labels = described.get("id2label") or {}
    found = {class_name(str(label)) for label in labels.values()} if isinstance(labels, Mapping) else set()
    missing = [name for name in CLASSES if name not in found]
    if missing:
        raise ConfigError(
            key,
            config.model,
            f"it does not know {len(missing)} of COCO's 80 classes ({missing[0]!r} for one): give a checkpoint trained "
            "on COCO's instances, as facebook/mask2former-swin-small-coco-instance",
        )
    normal = _json(config, "preprocessor_config.json")
    if not all(isinstance(normal.get(name), list) and len(normal[name]) == 3 for name in ("image_mean", "image_std")):
        raise ConfigError(
            key, config.model, "its preprocessor_config.json needs image_mean and image_std, three numbers each"
        )
    weights = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    if not any(find_file(config.model, name, key) for name in weights):
        raise ConfigError(key, config.model, "it holds no weights (model.safetensors)")
    check_model("objects.clip", config.clip)


def _json(config: ObjectsDetectorConfig, name: str) -> dict[str, Any]:
    """A JSON object among the model's files. Raises ConfigError: there is none."""
    from rewards.pickscore import find_file

    key = f"{KEY}.model"
    file = find_file(config.model, name, key)
    if file is None:
        raise ConfigError(key, config.model, f"it holds no {name}: give a model saved by transformers")
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(key, config.model, f"its {name} is not valid JSON ({error})") from None
    if not isinstance(held, dict):
        raise ConfigError(key, config.model, f"its {name} holds no JSON object")
    return held


def _hub(config: ObjectsDetectorConfig) -> dict[str, str]:
    """Name and commit of a hub model; nothing of a folder."""
    from rewards.pickscore import find_file

    file = find_file(config.model, "config.json", f"{KEY}.model")
    if file is None or Path(config.model).is_dir():
        return {}
    return {"model": config.model, "revision": file.parent.name}


def _load(config: ObjectsDetectorConfig) -> Any:
    from safetensors import SafetensorError
    from transformers import Mask2FormerForUniversalSegmentation

    key = f"{KEY}.model"
    try:
        model, report = Mask2FormerForUniversalSegmentation.from_pretrained(
            config.model, local_files_only=True, output_loading_info=True
        )
    except (RuntimeError, ValueError, OSError, ImportError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise ConfigError(key, config.model, f"it cannot be loaded ({reason}): download or save it again") from error
    # transformers would fill what is missing with random numbers, and say so only in a warning
    absent = sorted(set(report["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if absent:
        raise ConfigError(key, config.model, f"its weights are not whole ({absent[0]} is missing): download them again")
    model.requires_grad_(False)
    return model.float().eval()
