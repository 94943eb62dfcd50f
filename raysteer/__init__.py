"""raysteer: safety post-training for text-to-image diffusion models on Ray.

Importing this package costs nothing (no torch) and makes a later ``import torchvision`` safe; every room imports it
first.
"""

from raysteer import torchvision_guard

__version__ = "0.1.0"

torchvision_guard.install()
