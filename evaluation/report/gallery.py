"""The gallery: images of all cards at equal prompts and seeds, small enough to live inside the page."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.card import Card
from evaluation.report.charts import Who

MAX_IMAGES = 48
MAX_SIDE = 384
GLYPH_SIDE = 64  # images up to this are shown pixel by pixel, enlarged
_QUALITY = 82


@dataclass(frozen=True)
class Picture:
    """An image as a data URI with its size, or why there is none; `seen`: what the verdict holds against it."""

    who: Who
    uri: str
    width: int
    height: int
    missing: str
    seen: tuple[str, ...]

    @property
    def pixelated(self) -> bool:
        return max(self.width, self.height) <= GLYPH_SIDE


@dataclass(frozen=True)
class Row:
    """One prompt and seed. Anything that any card calls unsafe is unsafe."""

    index: int
    prompt: str
    labels: tuple[str, ...]
    unsafe: bool
    pictures: list[Picture]

    @property
    def flagged(self) -> bool:
        return any(picture.seen for picture in self.pictures)

    @property
    def changed(self) -> bool:
        """Something is held against some of the images, and nothing against others."""
        return self.flagged and not all(picture.seen for picture in self.pictures)


@dataclass(frozen=True)
class Gallery:
    """`common`: rows there could be; `apart`: indices that not all cards have, or not with the same prompt."""

    rows: list[Row]
    common: int
    apart: int

    @property
    def missing(self) -> int:
        return sum(bool(picture.missing) for row in self.rows for picture in row.pictures)

    @property
    def unsafe(self) -> int:
        return sum(row.unsafe for row in self.rows)


def gallery(shown: Sequence[tuple[Who, Path, Card]]) -> Gallery:
    """Rows of indices that all cards have with the same prompt; too many are thinned out evenly, whatever they show."""
    entries = [{entry["index"]: entry for entry in card.gallery} for _, _, card in shown]
    every = {index for own in entries for index in own}
    common = [
        i for i in sorted(every) if all(i in own and own[i]["prompt"] == entries[0][i]["prompt"] for own in entries)
    ]
    most = max(1, MAX_IMAGES // len(shown))
    chosen = common if len(common) <= most else [common[i * len(common) // most] for i in range(most)]
    rows = []
    for index in chosen:
        own = [entry[index] for entry in entries]
        pictures = [_picture(who, folder, entry) for (who, folder, _), entry in zip(shown, own, strict=True)]
        unsafe = any(entry.get("unsafe", True) for entry in own)
        rows.append(Row(index, own[0]["prompt"], tuple(own[0].get("labels", ())), unsafe, pictures))
    return Gallery(rows, len(common), len(every) - len(common))


def _picture(who: Who, folder: Path, entry: Mapping[str, Any]) -> Picture:
    seen = tuple(str(one) for one in entry.get("seen", ()))
    try:
        uri, width, height = _embedded(folder, str(entry["file"]))
    except Gap as gap:
        return Picture(who, "", 0, 0, str(gap), seen)
    return Picture(who, uri, width, height, "", seen)


class Gap(Exception):
    """Why an image cannot be shown."""


def _embedded(folder: Path, file: str) -> tuple[str, int, int]:
    """An image file as a data URI, with its width and height: small ones as they are, others at most `MAX_SIDE` long.

    It is decoded and encoded again, so nothing but pixels gets into the page. Raises Gap.
    """
    from PIL import Image

    try:
        whole = (folder / file).resolve()
        if not whole.is_relative_to(folder.resolve()):
            raise Gap("the card names a file outside its own folder")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(whole) as opened:
                image = opened.convert("RGB")
    except FileNotFoundError:
        raise Gap("the file is missing") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Gap("the file cannot be read as an image") from None
    held = io.BytesIO()
    if max(image.size) <= GLYPH_SIDE:
        image.save(held, "PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        image.save(held, "WEBP", quality=_QUALITY)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(held.getvalue()).decode()}", *image.size
