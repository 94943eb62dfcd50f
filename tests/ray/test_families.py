"""Every model family through the whole system: two real steps, the parity gate passed, an adapter diffusers loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tests.ray.conftest import World
from tests.tiny_flow import RESOLUTION, tiny_flux, tiny_sd3
from tests.tiny_unet import tiny_sd2, tiny_sdxl

pytestmark = pytest.mark.timeout(500)


class Case(NamedTuple):
    """A family's tiny model and what its recipe changes."""

    folder: Callable[[], Path]
    changes: dict[str, Any]


CASES = {
    "sd2-v": Case(tiny_sd2, {}),
    "sdxl": Case(tiny_sdxl, {"sampling__mixed": True}),
    "sd3": Case(tiny_sd3, {"sampling__flow": {"kind": "sde", "level": 0.7}, "sampling__guidance_scale": 4.5}),
    "flux": Case(
        tiny_flux,
        {
            "model__resolution": RESOLUTION,
            "sampling__mixed": True,
            "sampling__flow": {"kind": "cps", "level": 0.8},
            "sampling__trained": {"mode": "sliding", "count": 2, "every": 1},
            "optimizer__ema_decay": 0.5,
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_two_steps_of_every_family_and_an_adapter_that_plain_diffusers_loads(
    ray_cluster: Any, world: World, name: str
) -> None:
    from diffusers import DiffusionPipeline

    from cluster.train import train

    case = CASES[name]
    world.plan_faults()
    changes = {"model__lora": {"rank": 2, "alpha": 8.0}} | case.changes
    recipe = world.recipe(
        f"family-{name}",
        run__steps=2,
        run__groups_per_step=2,
        run__checkpoint_every=2,
        model__path=str(case.folder()),
        optimizer__lr=0.01,
        **changes,
    )
    result = train(recipe)
    assert (result.status, result.steps) == ("finished", 2)
    rows = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["objective/ratio_max_dev"] == 0.0, "fresh samples replay exactly"
    assert rows[1]["optimizer/grad_norm"] > 0.0

    def picture(adapter: Path | None) -> np.ndarray:
        pipe = DiffusionPipeline.from_pretrained(case.folder(), safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        if adapter is not None:
            pipe.load_lora_weights(adapter)
        generator = torch.Generator().manual_seed(0)
        size = 8 * pipe.vae_scale_factor
        return pipe(
            "a toxic sign", num_inference_steps=3, generator=generator, output_type="np", height=size, width=size
        ).images

    assert result.adapter_dir is not None
    assert np.abs(picture(result.adapter_dir) - picture(None)).max() > 1e-4, "the trained adapter changes the image"
