"""Drivers of Nsight Systems, Nsight Compute, Proton and PyTorch's profiler, and their summaries."""
