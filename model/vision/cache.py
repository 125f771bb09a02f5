"""Cache of images' decoder embeddings, keyed by the content of their views.

An image that occurs again, in the same call or a later one, is encoded once and gets the bits of
its first encoding. An image encoded alone always gets the same bits, cached or not. Encoded with
others, its bits may differ from those by rounding, as in any matrix product of another size, and
the cache then returns these bits.
"""

import hashlib
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from kernels.runtime.lru import Lru


class Tower(Protocol):
    """What the cache needs of a vision tower (model.vision.tower.VisionTower)."""

    def __call__(self, views: Sequence[Tensor]) -> Tensor: ...

    def count(self, views: Sequence[Tensor]) -> int: ...


class ImageCache(Lru):
    """Embeddings [tokens, hidden] by `image_key`, on the model's device.

    `budget` is in bytes and may be set at any time; with 0, images are neither hashed nor kept, and
    every occurrence is encoded. One image of the 10B takes up to 25 MB.
    """

    def __init__(self, budget: int = 2**30) -> None:
        super().__init__(budget)

    def encode(self, images: Sequence[Sequence[Tensor]], tower: Tower) -> Tensor:
        """Embeddings [tokens, hidden] of one or more images, each given as its views, in order.

        `tower` is called at most once, for all new images. The caller may overwrite the result.
        """
        keys: list[Hashable] = list(map(image_key, images) if self.budget else range(len(images)))
        known: dict[Hashable, Tensor] = {
            key: cached for key in keys if (cached := self.get(key)) is not None
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
    """SHA-256 of the views' dtypes, shapes and values, one thread per view: an image of 37 views
    has 116 MB."""
    with ThreadPoolExecutor() as pool:
        return b"".join(pool.map(_view_key, views))


def _view_key(view: Tensor) -> bytes:
    digest = hashlib.sha256(f"{view.dtype} {tuple(view.shape)};".encode())
    digest.update(view.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.digest()
