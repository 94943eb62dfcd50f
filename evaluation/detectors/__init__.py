"""Detectors: what they see in an image, as data. One file each; thresholds that only count belong to the suites."""
