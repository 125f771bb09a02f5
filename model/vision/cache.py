"""Decoder embeddings of images seen before, found by the content of their views.

An image whose pixels return, in the same call or in a later one, is encoded once, and what is
served are the bits of that time. Without the cache, too, an image alone in its call always gets the
same bits; encoded together with others it may differ from them by rounding, as matrix products of
other sizes do, and then that is what returns.
"""

import hashlib
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from kernels.runtime.lru import Lru


class Tower(Protocol):
    """What is asked of a vision tower: model.vision.tower.VisionTower has it."""

    def __call__(self, views: Sequence[Tensor]) -> Tensor: ...

    def count(self, views: Sequence[Tensor]) -> int: ...


class ImageCache(Lru):
    """Embeddings [tokens, hidden] by `image_key`, on the model's device.

    `budget` is in bytes and may be set at any time; with 0 no image is hashed, held, or encoded
    less often than it is given. One image of the 10B takes up to 25 MB.
    """

    def __init__(self, budget: int = 2**30) -> None:
        super().__init__(budget)

    def encode(self, images: Sequence[Sequence[Tensor]], tower: Tower) -> Tensor:
        """Embeddings [tokens, hidden] of one image or more, given as their views, in order.

        `tower` is called once, for all images that are new. The result is the caller's own.
        """
        keys: list[Hashable] = list(map(image_key, images) if self.budget else range(len(images)))
        known: dict[Hashable, Tensor] = {
            key: found for key in keys if (found := self.get(key)) is not None
        }
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in known}
        if new:
            features = tower([view for views in new.values() for view in views])
            parts = features.split([tower.count(views) for views in new.values()])
            for key, part in zip(new, parts, strict=True):
                known[key] = part.clone() if self.budget else part
                if self.budget:
                    self.put(key, known[key], part.nbytes)
            if len(new) == len(images):
                return features
        return torch.cat([known[key] for key in keys])


def image_key(views: Sequence[Tensor]) -> bytes:
    """SHA-256 of the views' dtypes, shapes and values, each view's by a thread: an image of 37
    views has 116 MB."""
    with ThreadPoolExecutor() as pool:
        return b"".join(pool.map(_view_key, views))


def _view_key(view: Tensor) -> bytes:
    digest = hashlib.sha256(f"{view.dtype} {tuple(view.shape)};".encode())
    digest.update(view.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.digest()
