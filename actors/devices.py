"""Where an actor computes."""

from __future__ import annotations


def prepare_device(device: str) -> str:
    """Resolve "auto" to "cuda" when Ray granted this process a GPU, else "cpu"; on the CPU use one thread.

    Two processes with one thread each beat one with two on busy cores, and a fixed thread count keeps sums in one
    order.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    return device
