"""Ray actors: thin shells over `diffusion` and `rewards`. Plain classes, made actors where they are started."""

import raysteer  # noqa: F401  (installs the torchvision guard)
