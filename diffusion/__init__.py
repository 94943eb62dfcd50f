"""The policy: a diffusers pipeline with a LoRA adapter, its stochastic steps and their log-probs. No Ray here."""

import raysteer  # noqa: F401  (the torchvision guard must be in place before diffusers is imported)
