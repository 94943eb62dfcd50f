"""Rewards: pure functions from images and prompts to scores. No Ray here."""

import raysteer  # noqa: F401  (the torchvision guard must be in place before open_clip is imported)
