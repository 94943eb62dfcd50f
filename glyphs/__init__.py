"""The glyph world: an embedded miniature of the whole problem, with exact detectors."""

import raysteer  # noqa: F401  (the torchvision guard)
