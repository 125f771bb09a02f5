"""Data sheets' peak rates of GPUs, for MFU and MBU: shares of a rate that no program reaches.

The measured ceilings (roofline.py) say how good a kernel is on this machine; the data sheet's make
figures of different machines and papers comparable. Dense products, without sparsity, at boost
clocks. Sources: NVIDIA's data sheets of H100 (2023), H200 (2024) and A100 (2021).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peak:
    """Rates of one GPU by its data sheet."""

    memory_gb_s: float  # 1e9 per second
    tflop_s: float  # of products in 16 bits, 1e12 per second
    fp32_tflop_s: float  # without tensor cores

    def utilisation(
        self, microseconds: float, num_bytes: int, flops: int, dtype: torch.dtype
    ) -> tuple[float, float]:
        """MFU and MBU: `flops` and `num_bytes` in this time, as fractions of the peak rates."""
        tflop_s = self.fp32_tflop_s if dtype.itemsize == 4 else self.tflop_s
        return (
            flops / microseconds / tflop_s / 1e6,
            num_bytes / microseconds / self.memory_gb_s / 1e3,
        )


PEAKS = {  # by the name that torch.cuda.get_device_name returns
    "NVIDIA H200": Peak(4800.0, 989.0, 67.0),
    "NVIDIA H200 NVL": Peak(4800.0, 836.0, 60.0),
    "NVIDIA H100 80GB HBM3": Peak(3350.0, 989.0, 67.0),
    "NVIDIA H100 NVL": Peak(3900.0, 836.0, 60.0),
    "NVIDIA H100 PCIe": Peak(2000.0, 756.0, 51.0),
    "NVIDIA A100-SXM4-80GB": Peak(2039.0, 312.0, 19.5),
    "NVIDIA A100 80GB PCIe": Peak(1935.0, 312.0, 19.5),
    "NVIDIA A100-SXM4-40GB": Peak(1555.0, 312.0, 19.5),
    "NVIDIA A100-PCIE-40GB": Peak(1555.0, 312.0, 19.5),
}


def peak_of(device: torch.device) -> Peak | None:
    """The data sheet's rates; None for a CPU and for a GPU that is not in PEAKS."""
    return PEAKS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
