"""Decoder embeddings of images seen before, found by the content of their views.

An image whose pixels return, in the same call or in a later one, is encoded once, and what is
served are the bits of that time. Without the cache, too, an image alone in its call always gets the
same bits; encoded together with others it may differ from them by rounding, as matrix products of
other sizes do, and then that is what returns.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from kernels.runtime.lru import Lru


class ImageCache(Lru):
    """Embeddings [tokens, hidden] by `image_key`, on the model's device.

    `budget` is in bytes and may be set at any time; with 0 no image is hashed, held, or encoded
    less often than it is given. One image of the 10B takes up to 25 MB.
    """

    def __init__(self, budget: int = 2**30) -> None:
        super().__init__(budget)

    def encode(
        self,
        images: Sequence[Sequence[Tensor]],
        rows: Sequence[Tensor],
        out: Tensor,
        tower: Callable[..., object],
    ) -> None:
        """Write the embeddings of image i, given as its views, to out[rows[i]].

        `tower(views, out=out, rows=rows)` is called once, for all images that are new.
        """
        new: dict[object, list[int]] = {}  # key -> which of `images` it is
        for index, views in enumerate(images):
            key = image_key(views) if self.budget else index
            known = self.get(key)
            if known is None:
                new.setdefault(key, []).append(index)
            else:
                out.index_copy_(0, rows[index], known)
        if new:
            firsts = [first for first, *_ in new.values()]
            views = [view for first in firsts for view in images[first]]
            tower(views, out=out, rows=torch.cat([rows[first] for first in firsts]))
        for key, (first, *again) in new.items() if self.budget else ():
            embeddings = out[rows[first]]  # a copy: `out` is the caller's
            self.put(key, embeddings, embeddings.nbytes)
            for index in again:
                out.index_copy_(0, rows[index], embeddings)


def image_key(views: Sequence[Tensor]) -> bytes:
    """SHA-256 of the views' dtypes, shapes and values, each view's by a thread: an image of 37
    views has 116 MB."""
    with ThreadPoolExecutor() as pool:
        return b"".join(pool.map(_view_key, views))


def _view_key(view: Tensor) -> bytes:
    digest = hashlib.sha256(f"{view.dtype} {tuple(view.shape)};".encode())
    digest.update(view.cpu().contiguous().view(torch.uint8).numpy())
    return digest.digest()
