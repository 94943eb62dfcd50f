"""``raysteer sample``: one picture of what an adapter does, and of how much of it a user may want.

Invariants
1. Every image of a row has the same prompt, seed, steps and guidance, and is drawn in a batch of its own: only the
   scale of the adapter differs.
2. Scale 0 is the base model and scale 1 the adapter, to the bit; in between the adapter's part of every layer is
   linear in the scale.
3. What can be known to be wrong is said before a model is loaded.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cluster.source import Source, base_model, find_adapter
from raysteer.errors import PromptError, StorageError, UserError

if TYPE_CHECKING:
    from diffusion.policy import DiffusionPolicy

MAX_SCALE = 2.0
BEFORE_AFTER = (0.0, 1.0)


@dataclass(frozen=True)
class Look:
    """What to draw: a row for each prompt, a column for each scale. None takes the value of the run's evaluation."""

    prompts: tuple[str, ...]
    scales: tuple[float, ...] = BEFORE_AFTER
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None


def parse_look(
    prompts: Sequence[str], scales: Sequence[str], seed: str, steps: str | None, guidance: str | None
) -> Look:
    """A look from the texts of a command line; a scale may be a list ("0,0.5,1").

    Raises:
        PromptError: no prompt, or an empty one.
        UserError: a number that is none, or is out of its range.
    """
    if not prompts:
        raise PromptError("--prompt", "is missing", 'say what to draw, for example --prompt "a red circle"')
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise PromptError(f"--prompt (number {number})", "is empty", "say what to draw")
    texts = [text for several in scales for text in several.split(",")]
    return Look(
        prompts=tuple(prompts),
        scales=tuple(_number("--scale", text, 0.0, MAX_SCALE) for text in texts) or BEFORE_AFTER,
        seed=_whole("--seed", seed, 0, 2**63 - 1),
        steps=None if steps is None else _whole("--steps", steps, 1, 10_000),
        guidance=None if guidance is None else _number("--guidance", guidance, 0.0, 1000.0),
    )


def sample(
    source: str,
    prompts: Sequence[str],
    scales: Sequence[str],
    seed: str,
    steps: str | None,
    guidance: str | None,
    out: str,
    model: str | None,
    storage: str,
    notify: Callable[[str], None],
) -> Path:
    """Draw and write the picture; the texts are those of the command line (see ``parse_look``).

    Returns:
        The PNG.

    Raises:
        UserError: something the user can fix (PromptError, StorageError, ExportError, ModelError ...).
    """
    look = parse_look(prompts, scales, seed, steps, guidance)
    file = _writable(Path(out))
    found = find_adapter(source, storage)
    look = _filled_in(look, found)
    config = base_model(found, model)

    import torch

    from diffusion.policy import DiffusionPolicy
    from evaluation.strip import scale_strip

    device = "cuda" if torch.cuda.is_available() else "cpu"
    notify(f"{found.words} on {config.path} ({device}, {config.dtype})")
    policy = DiffusionPolicy.load(config, device)
    policy.load_adapter(found.state)
    for prompt in look.prompts:
        if policy.truncated(prompt):
            notify(f"note: the model reads only the beginning of this prompt: {prompt[:60]}…")
    if any(scale > 1 for scale in look.scales):
        notify("note: above 1 the adapter is stronger than it was ever trained to be")
    images = draw(policy, look, notify)
    title = f"{found.name} · seed {look.seed} · {look.steps} steps · guidance {look.guidance:g}"
    facts = {
        **found.metadata,
        "prompts": look.prompts,
        "scales": look.scales,
        "seed": look.seed,
        "steps": look.steps,
        "guidance_scale": look.guidance,
        "base_model": config.path,
    }
    return scale_strip(file, images, look.prompts, look.scales, title, facts)


def draw(policy: DiffusionPolicy, look: Look, notify: Callable[[str], None] = lambda line: None) -> np.ndarray:
    """uint8 [prompts, scales, H, W, 3]. ``look.steps`` and ``look.guidance`` must be set; the policy's scale is 1 again
    afterwards.
    """
    from diffusion.sampling import generate

    assert look.steps is not None
    assert look.guidance is not None
    columns = []
    try:
        for scale in look.scales:
            notify(f"drawing {len(look.prompts)} x scale {scale:g}")
            policy.set_adapter_scale(scale)
            seeds = [look.seed] * len(look.prompts)
            columns.append(generate(policy, look.prompts, seeds, look.steps, look.guidance, batch_size=1))
    finally:
        policy.set_adapter_scale(1.0)
    return np.stack(columns, axis=1)


def _filled_in(look: Look, found: Source) -> Look:
    """The look with steps and guidance of the run's own pictures, or the usual ones."""
    from diffusion.sampling import SamplingConfig

    if look.steps is not None and look.guidance is not None:
        return look
    recipe = found.recipe()
    if recipe is None:
        usual = SamplingConfig()
        steps, guidance = usual.steps, usual.guidance_scale
    elif recipe.evaluation.suite is not None:
        steps, guidance = recipe.evaluation.steps, recipe.evaluation.guidance_scale
    else:
        steps, guidance = recipe.sampling.steps, recipe.sampling.guidance_scale
    return replace(
        look,
        steps=steps if look.steps is None else look.steps,
        guidance=guidance if look.guidance is None else look.guidance,
    )


def _writable(file: Path) -> Path:
    """``file``, if a PNG can be written there.

    Raises:
        StorageError: it cannot.
    """
    if file.suffix.lower() != ".png":
        raise StorageError(f"--out {file}", "is not the name of a PNG", "let it end in .png")
    if file.is_dir():
        raise StorageError(f"--out {file}", "is a folder", "name a file in it")
    if not file.parent.is_dir():
        raise StorageError(f"--out {file}", f"there is no folder {file.parent}", "make it, or choose another place")
    try:
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=".raysteer-")
    except OSError as error:
        raise StorageError(
            f"--out {file}", f"its folder cannot be written to ({error.strerror})", "choose another place"
        ) from None
    os.close(handle)
    os.unlink(name)
    return file


def _number(option: str, text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{option} {text.strip()}", "is not a number", f"use one from {low:g} to {high:g}")
    if not low <= value <= high:
        problem = "is negative" if value < 0 else f"is more than {high:g}"
        raise UserError(f"{option} {text.strip()}", problem, f"use a number from {low:g} to {high:g}")
    return value + 0.0  # -0 is 0


def _whole(option: str, text: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise UserError(f"{option} {text.strip()}", "is not a whole number", f"use {low} or more") from None
    if not low <= value <= high:
        raise UserError(f"{option} {value}", "is out of range", f"use a whole number from {low} to {high}")
    return value
