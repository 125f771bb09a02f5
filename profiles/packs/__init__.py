"""Kernels compiled here for a GPU node: packed, and unpacked there."""
