"""Pixels of an image's views, from bytes on the host to what the tower packs, on its device.

They travel as bytes. On the device they are normalised and resized in fp32, in the reference's
order: scaled to 0..1, normalised, and last resized (bilinear with antialias, without keeping the
aspect ratio). Normalised values have the same bits on every device. Resized ones have the
reference's bits on a CPU; a GPU adds up the same terms in another order, an error of fp32 rounding.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.runtime.dispatch import check

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class View:
    """A view before its last resize: `pixels` uint8 [height, width, 3], resized to a square of
    `side` pixels. Raises ValueError for other pixels."""

    pixels: Tensor
    side: int

    def __post_init__(self) -> None:
        shape, dtype = list(self.pixels.shape), self.pixels.dtype
        check(
            dtype == torch.uint8 and len(shape) == 3 and shape[2] == 3,
            f"pixels of a view must be uint8 [height, width, 3], not {dtype} {shape}",
        )

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes

    def on(self, device: torch.device) -> Tensor:
        """The view on a device: its bytes [side, side, 3] if they have that size, else normalised
        and resized, fp32 [3, side, side]."""
        pixels = self.pixels
        if device.type == "cuda" and not pixels.is_cuda:
            pixels = pixels.pin_memory()  # or the host would wait for all queued work
        pixels = pixels.to(device, non_blocking=True)
        size = self.side, self.side
        if pixels.shape[:2] == size:
            return pixels
        numbers = normalised(pixels)[None]
        return F.interpolate(
            numbers, size=size, mode="bilinear", align_corners=False, antialias=True
        )[0]


def normalised(pixels: Tensor) -> Tensor:
    """uint8 [height, width, 3] -> fp32 [3, height, width]: (pixel / 255 - mean) / std."""
    scale, mean, std = _constants(pixels.device)
    return pixels.permute(2, 0, 1).contiguous().float().div_(scale).sub_(mean).div_(std)


def byte_values() -> Tensor:
    """fp32 [3, 256]: each byte in each channel, normalised."""
    levels = torch.arange(256, dtype=torch.uint8)
    return normalised(levels[None, :, None].expand(1, 256, 3))[:, 0]


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """255, mean and std as tensors: CUDA multiplies by the reciprocal of a number, which rounds
    otherwise. Copying them makes the host wait, so each device keeps them."""
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    return torch.tensor(255.0, device=device), mean, std
