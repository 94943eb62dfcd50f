"""What the glyph world's models can and cannot tell apart: ``python -m benchmarks.glyph_world``.

Two questions about the shipped weights, answered on rendered scenes, so that no training is in between: does an image
survive the autoencoder (the ceiling of every figure), and which images does the steering reward prefer at which alpha?
Prints Markdown; takes half a minute on one core.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cluster.config import load_recipe
from evaluation.suites.glyphs import succeeds
from glyphs.detector import detect_all
from glyphs.grammar import Request, fulfil, parse, random_objects, stratified_prompts
from glyphs.pretrain import load_autoencoder, to_model_range
from glyphs.world import Scene, render
from rewards.anchors import load_anchors
from rewards.config import AnchorSet, RewardConfig
from rewards.steering import SteeringReward

ALPHAS = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
"""Values of reward.alpha."""
EMPTINESS = ("an empty image", "a blank picture", "an image of nothing")
"""The anchor phrases that make a blank image unattractive."""


def ceiling(count: int, seed: int) -> tuple[int, int]:
    """Held-out captions whose render still shows what was asked for after the autoencoder; and how many there were."""
    rng = np.random.default_rng(seed)
    captions = [
        parse(prompt)
        for prompt_class in ("safe", "unsafe")
        for prompt in stratified_prompts("test", prompt_class, count // 2, seed)
    ]
    images = np.stack([render(fulfil(request, rng), rng) for request in captions])
    autoencoder = load_autoencoder(Path("glyphs/weights"), "cpu")
    with torch.no_grad():
        latents = autoencoder.encode(to_model_range(torch.from_numpy(images).permute(0, 3, 1, 2))).latent_dist.mean
        decoded = (autoencoder.decode(latents).sample.clamp(-1, 1) + 1) * 127.5
    seen = detect_all(decoded.round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    return sum(succeeds(request, found) for request, found in zip(captions, seen, strict=True)), len(captions)


@dataclass(frozen=True)
class Alternatives:
    """Three images for one unsafe training caption: as asked for, with an object instead of the mark, blank."""

    request: Request
    images: np.ndarray


def alternatives(count: int, seed: int) -> list[Alternatives]:
    rng = np.random.default_rng(seed)
    found = []
    for prompt in stratified_prompts("train", "unsafe", count, seed):
        request = parse(prompt)
        marked = fulfil(request, rng)
        harmless = Scene(tuple(item for item in marked.items if item.colour is not None))
        if not harmless.items:
            thing = random_objects(1, rng)[0]
            place = marked.items[0]
            harmless = Scene((type(place)(thing.kind, thing.colour, place.column, place.row),))
        images = np.stack([render(scene, rng) for scene in (marked, harmless, Scene(()))])
        found.append(Alternatives(request, images))
    return found


def preferences(cases: list[Alternatives], config: RewardConfig) -> tuple[float, ...]:
    """Shares of cases, those with an object and those with a mark alone, in which the reward puts the harmless image
    over the marked one, the harmless over the blank, and the marked over the blank.
    """
    reward = SteeringReward(config)
    scores = np.stack([reward.score(case.images, [case.request.text] * 3).total for case in cases])
    marked, harmless, blank = scores.T
    alone = np.array([not case.request.objects for case in cases])
    verdicts = (harmless > marked, harmless > blank, marked > blank)
    return tuple(float(np.mean(verdict[which])) for verdict in verdicts for which in (~alone, alone))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.glyph_world", description=__doc__)
    parser.add_argument("--count", type=int, default=280)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)

    right, total = ceiling(args.count, args.seed)
    print(f"through the autoencoder: {right} of {total} renders of held-out captions are still as asked for\n")

    config = load_recipe("recipes/glyphs.yaml").reward
    anchors = load_anchors(config.anchors)
    without = tuple(phrase for phrase in anchors.unsafe if phrase not in EMPTINESS)
    cases = alternatives(args.count, args.seed)
    print("Share of unsafe captions for which one image scores higher (with an object / mark alone):\n")
    print("| alpha | phrases for emptiness | harmless over marked | harmless over blank | marked over blank |")
    print("|---|---|---|---|---|")
    for alpha in ALPHAS:
        for phrases in (0, 1, 3):
            own = AnchorSet(safe=anchors.safe, unsafe=without + EMPTINESS[:phrases])
            shares = preferences(cases, config.model_copy(update={"alpha": alpha, "anchors": own}))
            cells = [f"{shares[i]:.2f} / {shares[i + 1]:.2f}" for i in (0, 2, 4)]
            print(f"| {alpha:g} | {phrases} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
