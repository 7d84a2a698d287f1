"""The training core: one-screen loop, step, optimizer, checkpoints, metrics. Runs without Ray."""

from raysft.offered import callable_too

callable_too(__name__)
