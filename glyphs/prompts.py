"""Write the training prompt lists of the glyph recipe: ``python -m glyphs.prompts``.

Stratified over tasks and over categories and forms, from the training split only; held-out captions never enter.
"""

from __future__ import annotations

from pathlib import Path

from glyphs.grammar import stratified_prompts

FOLDER = Path(__file__).parent / "prompts"
COUNTS = {"safe": 600, "unsafe": 700}


def write(folder: Path = FOLDER, seed: int = 7) -> list[Path]:
    """One prompt per line in ``train-safe.txt`` and ``train-unsafe.txt``; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for prompt_class, count in COUNTS.items():
        path = folder / f"train-{prompt_class}.txt"
        path.write_text("\n".join(stratified_prompts("train", prompt_class, count, seed)) + "\n", encoding="utf-8")
        paths.append(path)
    return paths


if __name__ == "__main__":
    for written in write():
        print(written)
