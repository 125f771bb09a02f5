"""Profilers: Nsight Systems, Nsight Compute, Proton and PyTorch's, and parsers of their output."""
