"""Profilers: Nsight Systems and Compute, Proton, PyTorch's, and the reading of what they write."""
