"""Benchmarks: measurements one can repeat."""

import raysteer  # noqa: F401  (the torchvision guard)
