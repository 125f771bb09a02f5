"""Matrix products and convolutions by a persistent Triton kernel."""

from kernels.gemm.op import check_placing, convolution, halved, linear, windows_of

__all__ = ["check_placing", "convolution", "halved", "linear", "windows_of"]
