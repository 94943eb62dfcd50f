"""The command line. Heavy imports happen inside the commands, so that ``--help`` is instant."""

import os

from cluster import cli_runs, cli_tools
from cluster.cli_shell import app

__all__ = ["app", "cli_runs", "cli_tools", "main"]  # importing them is what adds their commands


def main() -> None:
    """Entry point of the ``raysteer`` script."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()
