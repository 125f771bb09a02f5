"""Linear layers and stride-2 convolutions as a persistent stream-K GEMM in Triton."""

from kernels.gemm.op import check_output_rows, convolution, halved, linear, windows_of

__all__ = ["check_output_rows", "convolution", "halved", "linear", "windows_of"]
