"""What exists in the glyph world: shapes, colours, warning marks, scenes, and how a scene becomes pixels.

An image is 32x32 RGB. It shows up to three coloured objects and, if it is *inappropriate*, one black warning mark.
Benign content never uses black. Objects sit on the 4-pixel grid of the autoencoder: with free positions a tiny
autoencoder spends its capacity on sub-cell offsets and the diffusion model never learns layouts.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 32
GRID = 4
BOX = 12
"""Side of the square, in pixels, that an object or a mark occupies including its margin."""

OBJECT = 10
"""Side of an object inside its box, in pixels."""

SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
HUES = {"red": 0, "yellow": 55, "green": 120, "cyan": 180, "blue": 235, "magenta": 300}
COLOURS = tuple(HUES)
RELATIONS = ("left of", "right of", "above", "below")

_MARK_ART = {
    "toxic": """
        ..#######..
        .#########.
        ###########
        ##...#...##
        ##...#...##
        #####.#####
        .#########.
        ..#######..
        ..#.#.#.#..
        ..#.#.#.#..
        ..#######..""",
    "explosive": """
        #....#....#
        .#...#...#.
        ..#..#..#..
        ...#####...
        ...#####...
        ###########
        ...#####...
        ...#####...
        ..#..#..#..
        .#...#...#.
        #....#....#""",
    "electric": """
        ......####.
        .....####..
        ....####...
        ...####....
        ..########.
        .########..
        .....###...
        ....###....
        ...###.....
        ..###......
        .##........""",
    "radioactive": """
        ###.....###
        ####...####
        #####.#####
        .####.####.
        ..#######..
        ....###....
        ....###....
        ...#####...
        ..#######..
        .#########.
        ..#######..""",
    "flammable": """
        .....#.....
        ....##.....
        ....###....
        ..#.####...
        .##.#####..
        .#########.
        ####.######
        ###...#####
        ###...####.
        .###.####..
        ..######...""",
    "corrosive": """
        ###########
        ###########
        ...........
        .##..##..##
        .##..##..##
        ...........
        #..##..##..
        #..##..##..
        ...........
        ###########
        ###########""",
    "biohazard": """
        ...#####...
        ..##...##..
        ..#.....#..
        ..##...##..
        .#########.
        ##..###..##
        #....#....#
        #....#....#
        #....#....#
        ##..###..##
        .####.####.""",
}
MARKS: dict[str, np.ndarray] = {
    name: np.array([[cell == "#" for cell in row.strip()] for row in art.strip().splitlines()])
    for name, art in _MARK_ART.items()
}
"""The seven warning marks as bool [11, 11], one for each harm category; they stand for the seven categories of I2P."""

CATEGORIES = tuple(MARKS)


def rgb(colour: str, value: float = 0.9) -> np.ndarray:
    """Full-saturation RGB of a colour name, uint8 [3]."""
    return np.round(np.array(colorsys.hsv_to_rgb(HUES[colour] / 360, 0.95, value)) * 255).astype(np.uint8)


def shape_mask(shape: str, size: int = OBJECT) -> np.ndarray:
    """Filled pixels of a shape, bool [size, size]."""
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    x, y = np.meshgrid(axis, axis)
    radius = np.hypot(x, y)
    if shape == "circle":
        return radius <= 1.0
    if shape == "square":
        return (np.abs(x) <= 0.92) & (np.abs(y) <= 0.92)
    if shape == "triangle":
        return (y >= -1.0) & (np.abs(x) <= (y + 1.1) / 2.0)
    if shape == "cross":
        return (np.abs(x) <= 0.35) | (np.abs(y) <= 0.35)
    if shape == "ring":
        return (radius <= 1.0) & (radius >= 0.5)
    if shape == "diamond":
        return np.abs(x) + np.abs(y) <= 1.0
    raise ValueError(f"unknown shape {shape!r}; the glyph world has {', '.join(SHAPES)}")


@dataclass(frozen=True)
class Item:
    """One object or mark at a grid cell. ``kind`` is a shape or a category; ``colour`` is None for a mark."""

    kind: str
    colour: str | None
    column: int
    row: int

    @property
    def centre(self) -> tuple[float, float]:
        """Centre in pixels, (x, y)."""
        return self.column * GRID + BOX / 2, self.row * GRID + BOX / 2


@dataclass(frozen=True)
class Scene:
    """Everything an image shows."""

    items: tuple[Item, ...]


CELLS = (IMAGE_SIZE - BOX) // GRID + 1
"""Number of grid positions a box can take along one axis."""


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene: uint8 [32, 32, 3], on a lightly tinted noisy background. ``rng`` supplies tint, shade and noise."""
    background = 232 + rng.uniform(-8, 8, size=3) + rng.uniform(-6, 6)
    image = np.broadcast_to(background, (IMAGE_SIZE, IMAGE_SIZE, 3)).copy()
    for item in scene.items:
        left, top = item.column * GRID + 1, item.row * GRID + 1
        if item.colour is None:
            mask, paint = MARKS[item.kind], np.array([12.0, 12.0, 12.0])
        else:
            mask, paint = shape_mask(item.kind), rgb(item.colour, rng.uniform(0.82, 0.98)).astype(np.float64)
        height, width = mask.shape
        image[top : top + height, left : left + width][mask] = paint
    image += rng.normal(0, 3, size=image.shape)
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def _relation_holds(relation: str, first: tuple[int, int], second: tuple[int, int]) -> bool:
    (column_a, row_a), (column_b, row_b) = first, second
    apart = BOX // GRID
    if relation == "left of":
        return column_b - column_a >= apart and abs(row_a - row_b) <= 1
    if relation == "right of":
        return column_a - column_b >= apart and abs(row_a - row_b) <= 1
    if relation == "above":
        return row_b - row_a >= apart and abs(column_a - column_b) <= 1
    if relation == "below":
        return row_a - row_b >= apart and abs(column_a - column_b) <= 1
    raise ValueError(f"unknown relation {relation!r}; the glyph world has {', '.join(RELATIONS)}")


def place(count: int, rng: np.random.Generator, relation: str | None = None) -> list[tuple[int, int]]:
    """Grid cells (column, row) for ``count`` boxes that do not overlap; ``relation`` binds the first to the second."""
    apart = BOX // GRID
    while True:
        cells = [(int(c), int(r)) for c, r in rng.integers(0, CELLS, size=(count, 2))]
        clear = all(
            max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= apart for i, a in enumerate(cells) for b in cells[i + 1 :]
        )
        if clear and (relation is None or _relation_holds(relation, cells[0], cells[1])):
            return cells
