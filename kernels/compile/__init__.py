"""Ahead-of-time compilation of Triton kernels without a GPU: record launches, compile, cache."""
