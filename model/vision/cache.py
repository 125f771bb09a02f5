"""Cache of images' decoder embeddings, by the digest of their pixels.

An image that occurs again, in the same call or a later one, is encoded once and gets the bits of
its first encoding. An image encoded alone always gets the same bits, cached or not. Encoded with
others, its bits may differ from those by rounding, as in any matrix product of another size, and
the cache then returns these bits.
"""

from collections.abc import Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kernels.runtime.lru import Lru
from model.vision.image import Views
from model.vision.pixels import View


class Tower(Protocol):
    """What the cache needs of a vision tower (model.vision.tower.VisionTower)."""

    def __call__(self, views: Sequence[View]) -> Tensor: ...

    def count(self, views: Sequence[View]) -> int: ...


class ImageCache(Lru):
    """Embeddings [tokens, hidden] by the images' digests, on the model's device.

    `budget` is in bytes and may be set at any time; with 0, nothing is kept, and every occurrence
    is encoded. So is every image without a digest. One image of the 10B takes up to 25 MB.
    """

    def __init__(self, budget: int = 2**30) -> None:
        super().__init__(budget)

    def encode(self, images: Sequence[Views], tower: Tower) -> Tensor:
        """Embeddings [tokens, hidden] of one or more images, in order.

        `tower` is called at most once, for all new images. The caller may overwrite the result.
        """
        keys: list[Hashable] = [
            image.digest if self.budget and image.digest else index
            for index, image in enumerate(images)
        ]
        known: dict[Hashable, Tensor] = {
            key: cached for key in keys if (cached := self.get(key)) is not None
        }
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in known}
        if new:
            features = tower([view for image in new.values() for view in image.all])
            parts = features.split([tower.count(image.all) for image in new.values()])
            for key, part in zip(new, parts, strict=True):
                known[key] = part
                if isinstance(key, bytes):
                    known[key] = part.clone()
                    self.put(key, known[key], part.nbytes)
            if len(new) == len(images):
                return features
        return torch.cat([known[key] for key in keys])
