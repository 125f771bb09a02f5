"""Linear layers and stride-2 convolutions as a persistent stream-K GEMM in Triton."""

from kernels.gemm.op import check_placing, convolution, halved, linear, windows_of

__all__ = ["check_placing", "convolution", "halved", "linear", "windows_of"]
