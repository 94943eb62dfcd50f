"""Strips: the same image under more and more of an adapter, pixel for pixel, with labels."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

CELL = 208  # smaller images are enlarged to about this, by a whole factor
INK, PALE, TRACK, FILL = "#1f2430", "#667085", "#e4e7ec", "#2e7d32"
MAX_PROMPT_LINES = 3


def scale_strip(
    path: Path,
    images: np.ndarray,
    prompts: Sequence[str],
    scales: Sequence[float],
    title: str,
    facts: Mapping[str, object],
) -> Path:
    """Write one PNG: a row for each prompt, a column for each scale, pixels unchanged (or each a square of them).

    Args:
        path: the file; replaced atomically if it is there.
        images: uint8 [prompts, scales, H, W, 3].
        prompts: shown above the rows.
        scales: shown above the columns, as a number and as a bar of which 1 is the whole length.
        title: shown above it all.
        facts: kept in the PNG's text entry "raysteer" as JSON.
    """
    from PIL import Image, ImageDraw
    from PIL.PngImagePlugin import PngInfo

    height, width = images.shape[2:4]
    factor = max(1, round(CELL / width))
    cell_w, cell_h = width * factor, height * factor
    gap = max(8, cell_w // 26)
    font, bold = _fonts(min(28, max(14, cell_w // 15)))
    line = round(font.size * 1.35)
    inner = max(len(scales) * (cell_w + gap) - gap, 20 * font.size)

    titled = _wrap(title, font, inner, 3)
    wrapped = [_wrap(prompt, bold, inner, MAX_PROMPT_LINES) for prompt in prompts]
    head = gap + len(titled) * line + gap + line + gap  # title, then numbers and bars
    total = head + sum(gap + len(lines) * line + gap // 2 + cell_h for lines in wrapped) + 2 * gap
    picture = Image.new("RGB", (inner + 4 * gap, total), "white")
    draw = ImageDraw.Draw(picture)

    left = 2 * gap
    for number, text in enumerate(titled):
        draw.text((left, gap + number * line), text, PALE, font)
    for column, scale in enumerate(scales):
        x, y = left + column * (cell_w + gap), gap + len(titled) * line + gap
        draw.text((x, y), heading(scale), INK, bold)
        bar = y + line + gap // 4
        draw.rectangle((x, bar, x + cell_w - 1, bar + 4), TRACK)
        if scale > 0:
            draw.rectangle((x, bar, x + round(cell_w * min(scale, 1.0)) - 1, bar + 4), FILL if scale <= 1 else INK)
    y = head
    for row, lines in enumerate(wrapped):
        y += gap
        for text in lines:
            draw.text((left, y), text, INK, bold)
            y += line
        y += gap // 2
        for column in range(len(scales)):
            enlarged = images[row, column].repeat(factor, 0).repeat(factor, 1)
            picture.paste(Image.fromarray(enlarged), (left + column * (cell_w + gap), y))
        y += cell_h

    info = PngInfo()
    info.add_text("raysteer", json.dumps(dict(facts), sort_keys=True))
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    picture.save(beside, format="PNG", pnginfo=info)
    os.replace(beside, path)
    return path


def heading(scale: float) -> str:
    """What a scale is called above its column."""
    name = "  base model" if scale == 0 else "  adapter" if scale == 1 else "  beyond training" if scale > 1 else ""
    return f"{scale:g}{name}"


def _fonts(size: int) -> tuple[FreeTypeFont, FreeTypeFont]:
    """Regular and bold; matplotlib brings them along, and they know Greek, Cyrillic and accents."""
    import matplotlib
    from PIL import ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return tuple(ImageFont.truetype(folder / name, size) for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"))  # type: ignore[return-value]


def _wrap(text: str, font: FreeTypeFont, width: int, most: int) -> list[str]:
    """Lines no wider than ``width`` pixels, at most ``most``; a word that is wider is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " …"]
    return lines
