"""The simulator: the scheduler on a virtual clock. No module in it imports torch."""
