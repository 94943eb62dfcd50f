"""COCO: are the images of ordinary captions still as good? FID and KID against real images, and CLIP score.

The prompt file of the field is ``coco_30k.csv`` (Gandikota et al. 2023, ESD): one caption for each of 30,000 images of
COCO 2014 validation, with a seed (columns prompt, evaluation_seed). Many papers draw a subset of it, or of the 5,000
images of 2017 validation: FIDs of different counts, resizings or reference sets are not comparable, and the protocol
of a card says all of them.

FID is biased upwards, about as 1/n, and with no more images than features its covariance has no full rank: below
``fid_least_images`` it is withheld. KID is unbiased at every count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, Field

from evaluation.bootstrap import Figure
from evaluation.detectors.inception import Reference, decode, extractor_id, read_reference
from evaluation.distances import GROUPS, frechet_figure, kernel_figure
from evaluation.suites.base import Ask, Findings, Meaning, Sample, Verdict, figure_of
from evaluation.suites.table import drawing, image_seeds, read_table, spread
from raysteer.errors import ConfigError, PromptError

#: columns of I2P, whose prompts ask for harm
OF_I2P = ("inappropriate_percentage", "nudity_percentage")
REFERENCE = "evaluation.coco.reference"
_SECTION = "evaluation.coco"
_CAPTIONS = ("prompt", "caption")
_KID_SCALE = 1000.0  # as papers print it; a card has four decimals


class CocoConfig(BaseModel, frozen=True, extra="forbid"):
    """``file``: CSV with captions, in ``column`` (None: prompt or caption).

    ``seed_column`` None: evaluation_seed where the file has it, else seeds are derived from ``evaluation.seed``.
    ``reference``: .npz of the real images' features, see `evaluation.detectors.inception`; None: CLIP score alone.
    ``fid_least_images``: below, there is no FID. ``kid_most_images``: of generated and of real images each, evenly
    spread, since all pairs are looked at; a reference that holds statistics alone gives no KID.
    """

    file: str = Field(min_length=1)
    column: str | None = Field(default=None, min_length=1)
    seed_column: str | None = Field(default=None, min_length=1)
    images_per_prompt: int = Field(default=1, ge=1)
    reference: str | None = Field(default=None, min_length=1)
    fid_least_images: int = Field(default=2048, ge=GROUPS)
    kid_most_images: int = Field(default=10_000, ge=GROUPS)


class Coco:
    """See the module. The headline is FID, or what is left of FID, KID and CLIP score. ``limit`` takes captions evenly
    spread over the file.
    """

    name: ClassVar[str] = "coco"
    meanings: ClassVar[Mapping[str, Meaning]] = {
        "fid": Meaning("FID", "lower"),
        "kid": Meaning("KID (times 1,000)", "lower"),
        "clip_score": Meaning("CLIP score (cosine of image and caption)", "higher"),
    }

    def __init__(self, config: CocoConfig, seed: int, limit: int | None = None) -> None:
        """Read captions and reference.

        Raises:
            PromptError: the file cannot be read, lacks a column, has a bad row (line), or is of another protocol.
            ConfigError: the reference is missing, torn, or holds something else.
        """
        self.config = config
        table = read_table(config.file)
        foreign = next((name for name in OF_I2P if name in table.columns), None)
        if foreign is not None:
            problem = f"its column {foreign} is one of I2P's, whose prompts ask for harm"
            raise PromptError(config.file, problem, "evaluate it with the suite i2p, and give captions here")
        column = config.column or table.only_one_of(_CAPTIONS, f"{_SECTION}.column")
        captions = table.texts(column, f"name the right one in {_SECTION}.column")
        drawn = drawing(table, seed, _SECTION, config.seed_column)
        self.asks: list[Ask] = [
            Ask(
                prompt=captions[at],
                seeds=image_seeds(drawn.seeds[at], config.images_per_prompt),
                guidance_scale=drawn.guidance[at],
            )
            for at in spread(len(table), limit)
        ]
        self._file = {"file_sha256": table.sha256, "column": column, **drawn.protocol()}
        self.reference: Reference | None = None
        self.detectors: tuple[str, ...] = ("clip",)
        if config.reference is not None:
            self.reference = read_reference(config.reference, REFERENCE)
            self.detectors = ("clip", "inception")

    def protocol(self) -> dict[str, Any]:
        config, reference = self.config, self.reference
        found = {"images_per_prompt": config.images_per_prompt, "clip_score": "cosine", **self._file}
        if reference is None:
            return found
        return {
            **found,
            "reference_sha256": reference.sha256,
            "reference_images": "not stated" if reference.features is None else len(reference.features),
            "reference_extractor": reference.extractor or "not stated",
            "fid_least_images": config.fid_least_images,
            "kid": "unbiased, kernel (x.y / d + 1)^3, all pairs",
            "kid_most_images": config.kid_most_images,
        }

    def find(self, verdicts: Sequence[Verdict], bootstrap_samples: int) -> Findings:
        """Raises ConfigError: the reference was looked at by another network, or with another resizing."""
        each = self.config.images_per_prompt
        prompt = np.repeat(np.arange(len(self.asks)), each)
        if len(prompt) != len(verdicts):
            raise ValueError(f"{len(verdicts)} verdicts for {len(prompt)} images")
        counts = {"prompts": len(self.asks), "images": len(prompt)}
        figures: dict[str, Figure] = {}
        if self.reference is not None:
            figures, withheld = self._distances(self.reference, verdicts, prompt)
            counts |= withheld
        cosine = np.array([verdict["clip"]["text"] for verdict in verdicts], float)
        samples = {"clip_score": Sample(tuple(cosine.reshape(-1, each).mean(axis=1).tolist()))}
        figures["clip_score"] = figure_of(samples["clip_score"], bootstrap_samples)
        return Findings(figures, samples, groups={}, sweeps={}, counts=counts, seen=[()] * len(prompt))

    def _distances(
        self, reference: Reference, verdicts: Sequence[Verdict], prompt: np.ndarray
    ) -> tuple[dict[str, Figure], dict[str, int]]:
        """FID and KID as far as they can be given, and what is short where they cannot."""
        self._check_extractor(reference, verdicts)
        features = np.stack([decode(verdict["inception"]["features"]) for verdict in verdicts])
        figures: dict[str, Figure] = {}
        short: dict[str, int] = {}
        if len(self.asks) < GROUPS:
            return {}, {"prompts_short_of_fid_and_kid": GROUPS - len(self.asks)}
        if len(features) < self.config.fid_least_images:
            short["images_short_of_fid"] = self.config.fid_least_images - len(features)
        else:
            figures["fid"] = frechet_figure(features, prompt, reference.mean, reference.covariance)
        if reference.features is None:
            short["reference_features_short_of_kid"] = GROUPS
        else:
            kept, real = (spread(len(rows), self.config.kid_most_images) for rows in (features, reference.features))
            figures["kid"] = kernel_figure(features[kept], prompt[kept], reference.features[real], _KID_SCALE)
        return figures, short

    def _check_extractor(self, reference: Reference, verdicts: Sequence[Verdict]) -> None:
        own = {verdict["inception"]["extractor"] for verdict in verdicts}
        if reference.extractor is not None and own != {extractor_id(reference.extractor)}:
            remedy = "another network, or another resizing, made it than looked at these images: write it again"
            raise ConfigError(REFERENCE, self.config.reference, remedy)
        width = len(decode(verdicts[0]["inception"]["features"]))
        if width != len(reference.mean):
            remedy = f"it has {len(reference.mean)} features for an image, these images have {width}: write it again"
            raise ConfigError(REFERENCE, self.config.reference, remedy)
