"""Evaluation: suites, metric card and report."""

import raysteer  # noqa: F401  (the torchvision guard)
