"""What makes it one system: configuration, admission, ledger, buffer, tracking and the command line."""

import raysteer  # noqa: F401  (the torchvision guard)
