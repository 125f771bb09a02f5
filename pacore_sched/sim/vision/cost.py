"""The cost model of the vision side: bytes and FLOPs of a batch of views, and the time they take.

A view is its number of patches; all views are squares. FLOPs are two per multiply-add of the matrix
products, from pixels to decoder embeddings: patch embedding, blocks, and the projector's two
convolutions, the second folded with the linear layer after it. A batch reads every weight once;
every linear layer reads its input and writes its output. Not counted: norms and activations, as in
the decoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from typing import Protocol

from model.config import VisionConfig, tokens_after_projector
from pacore_sched.sim.cost_model import VALUE_BYTES
from pacore_sched.sim.machine import Machine
from pacore_sched.sim.workload import Photo


@dataclass(frozen=True)
class VisionWork:
    """Bytes and FLOPs of a tower and its projector to `hidden` channels, by patches per view."""

    vision: VisionConfig
    hidden: int

    def views(self, photo: Photo) -> tuple[int, ...]:
        """Patches of each view of an image: its crops, then the global view."""
        crop = self.vision.crop_size // self.vision.patch_size
        return (crop**2,) * photo.crops + (self.vision.grid**2,)

    def pixel_bytes(self, photo: Photo) -> int:
        """Bytes that travel to the device: 8-bit RGB of the crops and of the whole image."""
        return 3 * (photo.crops * self.vision.crop_size**2 + photo.pixels)

    def linear_flops(self, views: Sequence[int]) -> int:
        """FLOPs of the linear layers and convolutions."""
        c, first, last = self.vision.width, 0, 0
        for patches in views:
            side = isqrt(patches)
            first += ((side + 1) // 2) ** 2  # positions after the first convolution
            last += tokens_after_projector(side)
        projector = first * 9 * c * 2 * c + last * 9 * 2 * c * self.hidden
        return 2 * (sum(views) * (self._embedding_values + self._block_values) + projector)

    def attention_flops(self, views: Sequence[int]) -> int:
        """FLOPs of QK and PV: within each view, every patch sees every patch."""
        return 4 * self.vision.layers * self.vision.width * sum(n * n for n in views)

    def linear_bytes(self, views: Sequence[int]) -> int:
        """Bytes of all weights once, and of the linear layers' inputs and outputs."""
        v = self.vision
        activations = v.layers * (8 * v.width + 2 * v.mlp_width)
        return VALUE_BYTES * (self._weight_values + sum(views) * activations)

    def attention_bytes(self, views: Sequence[int]) -> int:
        """Bytes of Q, K, V and the output."""
        return VALUE_BYTES * 4 * self.vision.layers * self.vision.width * sum(views)

    @cached_property
    def _embedding_values(self) -> int:
        return 3 * self.vision.patch_size**2 * self.vision.width

    @cached_property
    def _block_values(self) -> int:
        c = self.vision.width
        return self.vision.layers * (4 * c * c + 2 * c * self.vision.mlp_width)

    @cached_property
    def _weight_values(self) -> int:
        c = self.vision.width
        convolutions = 9 * c * 2 * c + 9 * 2 * c * self.hidden
        return self._embedding_values + self._block_values + convolutions


class VisionCost(Protocol):
    """The time of the tower and the projector; `work` has their bytes and FLOPs."""

    @property
    def work(self) -> VisionWork: ...

    def seconds(self, views: Sequence[int]) -> float:
        """Seconds of one call with views of this many patches, on a GPU that does nothing else."""
        ...


@dataclass(frozen=True)
class RooflineVision:
    """Linear layers, then attention, each limited by its bytes or by its FLOPs."""

    work: VisionWork
    machine: Machine

    def seconds(self, views: Sequence[int]) -> float:
        """As VisionCost.seconds."""
        work, machine = self.work, self.machine
        linear = max(
            work.linear_bytes(views) / machine.bytes_per_s,
            work.linear_flops(views) / machine.linear_flops_per_s,
        )
        attention = max(
            work.attention_bytes(views) / machine.bytes_per_s,
            work.attention_flops(views) / machine.attention_flops_per_s,
        )
        return linear + attention + machine.overhead_s
