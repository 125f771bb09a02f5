"""Triton kernels without a GPU: launches recorded, compiled ahead of time, found in the cache."""
