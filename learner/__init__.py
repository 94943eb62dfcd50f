"""The learner: advantages, objectives, and the loop that applies them."""

import raysteer  # noqa: F401  (the torchvision guard must be in place before diffusers is imported)
