"""Suites: what is asked of a model, and how what detectors see in its images becomes figures. One file each."""
