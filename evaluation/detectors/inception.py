"""Inception features for FID and KID, and the file of a reference set's features.

The network is the one of the original FID code (Heusel et al. 2017), as torch-fidelity has it, with its weights from a
file: nothing is downloaded. How images come to 299x299 pixels changes an FID by points, so it is part of who looked:

- ``clean``: PIL's bicubic with antialiasing, each channel in float, as clean-fid (Parmar et al. 2022);
- ``tensorflow``: TensorFlow 1's bilinear without antialiasing, as the original code and torch-fidelity.

Both squash an image that is not square. The features of the reference images are computed once:

    python -m evaluation.detectors.inception IMAGES reference.npz --weights WEIGHTS.pth
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import os
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from raysteer.errors import ConfigError, UserError

INSTALL = 'pip install "torch-fidelity>=0.4,<0.5"'
COMMAND = "python -m evaluation.detectors.inception IMAGES reference.npz --weights WEIGHTS.pth"
FEATURES = 2048
_KEY = "evaluation.detectors.inception"
_WEIGHTS = "pt_inception-2015-12-05-6726825d.pth (releases of pytorch-fid and torch-fidelity)"
_SIDE = 299
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# The network up to its last pooling, in order.
_LAYERS = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    *("Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool"),
)


class InceptionConfig(BaseModel, frozen=True, extra="forbid"):
    """``weights``: file of the original FID network for PyTorch. ``resize``: see the module. ``batch_size``: images in
    a forward, always; fewer are padded, so that features do not depend on their neighbours.
    """

    weights: str = Field(min_length=1)
    resize: Literal["clean", "tensorflow"] = "clean"
    batch_size: int = Field(default=16, ge=1)


class InceptionDetector:
    """Each verdict is {"extractor": who looked, in 16 hex digits, "features": 2048 little-endian float32 in base64}."""

    name = "inception"

    def __init__(self, config: InceptionConfig, device: str = "cpu") -> None:
        """Load the network.

        Raises:
            ConfigError: as `check`.
        """
        check(config)
        import torch

        self.config, self.device = config, torch.device(device)
        self.extractor = extractor(config)
        self.network = _network(config.weights).to(self.device)

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "version": version("torch-fidelity"), **self.extractor}

    def detect(self, images: np.ndarray, prompts: Sequence[str], base: np.ndarray | None) -> list[Any]:
        who = extractor_id(self.extractor)
        return [{"extractor": who, "features": encode(row)} for row in self.features(images)]

    def features(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """float32 [n, 2048] of uint8 images [H, W, 3] of any sizes."""
        import torch

        found = []
        size = self.config.batch_size
        for start in range(0, len(images), size):
            chunk = [self._resize(image) for image in images[start : start + size]]
            x = torch.zeros(size, 3, _SIDE, _SIDE)
            x[: len(chunk)] = torch.stack(chunk)
            x = (x.to(self.device) - 128) / 128
            with torch.no_grad():
                for layer in _LAYERS:
                    x = getattr(self.network, layer)(x)
            found.append(x.flatten(1)[: len(chunk)].float().cpu().numpy())
        return np.concatenate(found)

    def _resize(self, image: np.ndarray) -> Any:
        """float32 [3, 299, 299] in [0, 255]."""
        import torch

        if self.config.resize == "clean":
            from PIL import Image

            channels = [Image.fromarray(image[:, :, channel].astype(np.float32)) for channel in range(3)]
            small = [np.asarray(channel.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)) for channel in channels]
            return torch.from_numpy(np.stack(small).clip(0.0, 255.0))
        from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
        return interpolate_bilinear_2d_like_tensorflow1x(pixels, size=(_SIDE, _SIDE), align_corners=False)[0]


def _network(weights: str) -> Any:
    import torch
    from safetensors.torch import load_file
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from rewards.statedict import read_state_dict

    # The package unpickles whatever its file holds, code included: it gets a file of tensors alone.
    tensors = io.BytesIO()
    is_safe = Path(weights).suffix == ".safetensors"
    torch.save(load_file(weights) if is_safe else read_state_dict(Path(weights), f"{_KEY}.weights"), tensors)
    tensors.seek(0)
    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        remedy = f"they are another network's ({reason}); give {_WEIGHTS}"
        raise ConfigError(f"{_KEY}.weights", weights, remedy) from error


def check(config: InceptionConfig | None) -> None:
    """Refuse missing or foreign weights, and the absence of torch-fidelity.

    Raises:
        ConfigError: naming evaluation.detectors.inception.weights or the command that installs the package.
    """
    key = f"{_KEY}.weights"
    if config is None:
        raise ConfigError(key, None, f"add the file {_WEIGHTS}")
    if find_spec("torch_fidelity") is None:
        raise ConfigError(_KEY, "torch_fidelity", f"the package is not installed: {INSTALL}")
    if not Path(config.weights).is_file():
        raise ConfigError(key, config.weights, f"there is no such file; it is {_WEIGHTS}")
    from rewards.statedict import read_state_dict

    last = read_state_dict(Path(config.weights), key).get("fc.weight")
    if last is None or tuple(last.shape) != (1008, FEATURES):
        shape = "missing" if last is None else list(last.shape)
        remedy = f"it is another network than FID's (fc.weight is {shape}, not [1008, {FEATURES}]); give {_WEIGHTS}"
        raise ConfigError(key, config.weights, remedy)


def extractor(config: InceptionConfig) -> dict[str, Any]:
    """What features depend on: equal on every machine."""
    with open(config.weights, "rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    return {"features": FEATURES, "weights_sha256": weights, "resize": config.resize}


def extractor_id(found: dict[str, Any]) -> str:
    """An `extractor` in 16 hex digits."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def encode(row: np.ndarray) -> str:
    """Features as text: 2048 numbers written out would take three times the space, and lose their last bits."""
    return base64.b64encode(np.asarray(row, "<f4").tobytes()).decode()


def decode(text: str) -> np.ndarray:
    """float32 [d] of `encode`."""
    return np.frombuffer(base64.b64decode(text), "<f4")


# ---- the reference --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reference:
    """Features of a set of real images.

    Attributes:
        mean: float [d].
        covariance: float [d, d].
        features: float32 [n, d]; None in a file that holds statistics alone.
        extractor: who looked, see `extractor`; None in a file of another program, which does not say.
        sha256: of the file.
    """

    mean: np.ndarray
    covariance: np.ndarray
    features: np.ndarray | None
    extractor: dict[str, Any] | None
    sha256: str


def read_reference(path: str, key: str) -> Reference:
    """A file that `write_reference` wrote, or one of pytorch-fid or clean-fid (mu and sigma; feats).

    Raises:
        ConfigError: naming `key`: it is missing, torn, or holds something else.
    """
    file = Path(path)
    if file.is_dir():
        raise ConfigError(key, path, f"it is a folder; its features are computed once: {COMMAND}")
    if not file.is_file():
        raise ConfigError(key, path, f"there is no such file; write it once: {COMMAND}")
    try:
        with file.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        with np.load(file, allow_pickle=False) as held:
            arrays = {name: held[name] for name in ("mu", "sigma", "features", "feats", "extractor") if name in held}
        who = dict(json.loads(str(arrays["extractor"]))) if "extractor" in arrays else None
    except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        raise ConfigError(key, path, f"it is no .npz file of features ({reason}); write it again: {COMMAND}") from error
    features = arrays.get("features", arrays.get("feats"))
    if features is not None and (features.ndim != 2 or len(features) < 2):
        raise ConfigError(key, path, f"its features are {list(features.shape)}: [images, d] of two images or more")
    if not {"mu", "sigma"} <= arrays.keys():
        if features is None:
            raise ConfigError(key, path, f"it has neither features nor mu and sigma; write it: {COMMAND}")
        arrays["mu"], arrays["sigma"] = features.mean(axis=0, dtype=float), np.cov(features, rowvar=False, dtype=float)
    mean, covariance = arrays["mu"], arrays["sigma"]
    d = len(mean) if mean.ndim == 1 else 0
    if not d or covariance.shape != (d, d) or (features is not None and features.shape[1] != d):
        shapes = f"mu is {list(mean.shape)} and sigma {list(covariance.shape)}"
        raise ConfigError(key, path, f"its arrays do not fit each other ({shapes}); write it again: {COMMAND}")
    if not all(np.isfinite(a).all() for a in (mean, covariance, features) if a is not None):
        raise ConfigError(key, path, f"it has numbers that are not finite; write it again: {COMMAND}")
    return Reference(mean, covariance, features, who, sha256)


def check_reference(config: InceptionConfig, path: str, key: str) -> None:
    """Refuse a reference that another network or another resizing looked at: the distance would mean nothing.

    Raises:
        ConfigError: naming `key`, and what differs.
    """
    reference = read_reference(path, key)
    own = extractor(config)
    if reference.extractor is not None and reference.extractor != own:
        theirs = reference.extractor
        differ = "; ".join(f"{k} {theirs.get(k)}, not {v}" for k, v in own.items() if theirs.get(k) != v)
        raise ConfigError(key, path, f"its features were made with {differ}; write it again: {COMMAND}")
    if len(reference.mean) != FEATURES:
        raise ConfigError(key, path, f"it has {len(reference.mean)} features an image, not {FEATURES}")


def write_reference(folder: Path, out: Path, config: InceptionConfig, device: str = "cpu") -> int:
    """Features, mean and covariance of all images below a folder, in the order of their paths; how many there are.

    The file appears when it is complete. Raises UserError (no images, one that cannot be read) and ConfigError.
    """
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES)
    if len(files) < 2:
        remedy = f"give a folder of two real images or more ({', '.join(_SUFFIXES)})"
        raise UserError(str(folder), f"it holds {len(files)} images", remedy)
    if out.suffix != ".npz" or not out.parent.is_dir():
        raise UserError(str(out), "it cannot be written", "name a file ending in .npz, in a folder that is there")
    detector = InceptionDetector(config, device)
    size = config.batch_size
    chunks = [detector.features(list(_read(files[start : start + size]))) for start in range(0, len(files), size)]
    features = np.concatenate(chunks)
    torn = out.with_name(f".{out.name}.{os.getpid()}.npz")
    try:
        np.savez(
            torn,
            mu=features.mean(axis=0, dtype=np.float64),
            sigma=np.cov(features, rowvar=False, dtype=np.float64),
            features=features,
            extractor=np.array(json.dumps(detector.extractor, sort_keys=True)),
        )
        torn.replace(out)
    finally:
        torn.unlink(missing_ok=True)
    return len(files)


def _read(files: Sequence[Path]) -> Iterator[np.ndarray]:
    from PIL import Image, UnidentifiedImageError

    for file in files:
        try:
            with Image.open(file) as image:
                yield np.asarray(image.convert("RGB"))
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise UserError(str(file), f"is no readable image ({error})", "remove it, or copy it again") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command of the module."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.detectors.inception", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("images", type=Path, help="folder of real images")
    parser.add_argument("out", type=Path, help="file to write, .npz")
    parser.add_argument("--weights", required=True, help=_WEIGHTS)
    parser.add_argument("--resize", choices=("clean", "tensorflow"), default="clean")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    try:
        config = InceptionConfig(weights=given.weights, resize=given.resize, batch_size=max(1, given.batch_size))
        count = write_reference(given.images, given.out, config, given.device)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{given.out}: features of {count} images")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
