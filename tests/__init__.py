"""Tests: unit (no Ray), ray (one local cluster), gpu (marked)."""

import raysteer  # noqa: F401  (the torchvision guard)
