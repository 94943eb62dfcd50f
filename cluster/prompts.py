"""Prompt sets: two plain text files, one prompt per line, one file per prompt class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from raysteer.errors import PromptError

PromptClass = Literal["safe", "unsafe"]


class PromptsConfig(BaseModel, frozen=True, extra="forbid"):
    """Where the prompts come from. A class whose share is zero may have an empty file."""

    safe: str
    unsafe: str
    unsafe_fraction: float = Field(default=0.5, ge=0.0, le=1.0)


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a run in file order, so that a ticket id names the same prompt on every machine."""

    safe: tuple[str, ...]
    unsafe: tuple[str, ...]

    def of(self, prompt_class: PromptClass) -> tuple[str, ...]:
        return self.safe if prompt_class == "safe" else self.unsafe


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """Prompts of one file: UTF-8, one per line, blank lines skipped. Raises PromptError naming file and line."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise PromptError(
            str(path), f"cannot be read ({reason})", "give a text file with one prompt per line"
        ) from error
    prompts: list[str] = []
    for number, line in enumerate(raw.splitlines(), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise PromptError(f"{path}:{number}", "is not UTF-8 text", "save the file as UTF-8") from error
        if text:
            prompts.append(text)
    return tuple(prompts)


def load_prompts(cfg: PromptsConfig) -> PromptSet:
    """Both prompt classes; a class that the run will draw from must not be empty (PromptError)."""
    loaded: dict[str, tuple[str, ...]] = {"safe": (), "unsafe": ()}
    shares = {"safe": 1.0 - cfg.unsafe_fraction, "unsafe": cfg.unsafe_fraction}
    for prompt_class, path in (("safe", cfg.safe), ("unsafe", cfg.unsafe)):
        if shares[prompt_class] == 0.0:
            continue
        loaded[prompt_class] = read_prompts(path)
        if not loaded[prompt_class]:
            raise PromptError(
                str(path),
                f"holds no {prompt_class} prompt, but prompts.unsafe_fraction is {cfg.unsafe_fraction}",
                f"add prompts or set prompts.unsafe_fraction to {0 if prompt_class == 'unsafe' else 1}",
            )
    return PromptSet(**loaded)
