"""Model families: what differs between pipelines, and nothing else."""

import raysteer  # noqa: F401
