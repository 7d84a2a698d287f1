"""The training core: one-screen loop, step, optimizer, checkpoints, metrics. Runs without Ray."""
