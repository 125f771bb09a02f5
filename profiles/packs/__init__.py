"""Packs of kernels: compiled and packed on one machine, unpacked on a GPU node."""
