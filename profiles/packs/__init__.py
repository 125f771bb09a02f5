"""Packs of compiled kernels: written on any machine, unpacked on a GPU node."""
