"""Pixels of an image's views on the device: copied there as bytes, normalised and resized.

In the reference's order, in fp32: values are scaled to 0..1, normalised, and last resized (bilinear
with antialias, without keeping the aspect ratio). Normalised values have the same bits on every
device. Resized ones have the reference's bits on a CPU; a GPU adds up the same terms in another
order, an error of fp32 rounding.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.runtime.dispatch import check

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def byte_values() -> Tensor:
    """[3, 256]: what each byte is in each channel, fp32, normalised."""
    values = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    return normalised(values.permute(1, 2, 0)[None])[0, :, 0]


def normalised(pixels: Tensor) -> Tensor:
    """uint8 [n, height, width, 3] -> fp32 [n, 3, height, width]: (pixel / 255 - mean) / std."""
    scale, mean, std = _constants(pixels.device)
    return pixels.permute(0, 3, 1, 2).contiguous().float().div_(scale).sub_(mean).div_(std)


def views_on(device: torch.device, pixels: Tensor, side: int) -> Tensor:
    """n views of equal size, uint8 [n, height, width, 3], as the tower takes them, on `device`.

    Bytes [n, side, side, 3] if that is their size, else normalised and resized: fp32 [n, 3, side,
    side]. Raises ValueError for other shapes and dtypes.
    """
    check(
        pixels.dtype == torch.uint8 and pixels.ndim == 4 and pixels.shape[3] == 3,
        f"pixels of views must be uint8 [height, width, 3], not {pixels.dtype}"
        f" {list(pixels.shape[1:])}",
    )
    if device.type == "cuda" and not pixels.is_cuda:
        pixels = pixels.pin_memory()  # or the host would wait for all queued work
    pixels = pixels.to(device, non_blocking=True)
    if not len(pixels) or pixels.shape[1:3] == (side, side):
        return pixels
    return F.interpolate(
        normalised(pixels),
        size=(side, side),
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """255, mean and std as tensors: CUDA multiplies by the reciprocal of a number, which rounds
    otherwise. Copying them makes the host wait, so each device keeps them."""
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    return torch.tensor(255.0, device=device), mean, std
