"""``python -m cluster`` is the command line, for places where the ``raysteer`` script is not installed."""

from cluster.cli import main

main()
