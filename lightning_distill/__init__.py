"""Distil deep reinforcement learning policies into students a fraction of their size."""

import os

# TorchRL logs every import and collector at INFO by default.
os.environ.setdefault("RL_LOGGING_LEVEL", "ERROR")

__version__ = "0.1.0"
