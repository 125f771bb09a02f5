"""The simulator: the scheduler on a virtual clock. Nothing here imports torch."""
