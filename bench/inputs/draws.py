"""Seeded random numbers for inputs. Never zeros: hardware runs faster on zeros."""

import torch
from torch import Tensor

Device = torch.device | str


class NormalDraws:
    """Draws normal numbers on a device from its own generators: the global ones stay untouched."""

    def __init__(self, seed: int, device: Device, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.host = torch.Generator().manual_seed(seed)
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        device = self.generator.device
        x = torch.randn(shape, generator=self.generator, device=device, dtype=self.dtype)
        return x if scale == 1.0 else x.mul_(scale)
