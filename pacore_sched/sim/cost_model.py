"""The cost model of a decoder step: bytes and FLOPs from its shape, and the time they take.

The linear layers read every weight once per step. Attention reads the KV of the nodes that its rows
can see: each node once (shared reads), or once per row, as an engine without a prefix tree does.
Not counted: activations, which stay in the cache during decode; norms and sampling, which are part
of a machine's overhead; and the vision tower, whose time is in vision/cost.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Protocol

from model.config import Config, DecoderConfig, VisionConfig
from pacore_sched.sim.machine import Machine

KV_DTYPES = ("bf16", "fp8")
VALUE_BYTES = 2  # of a weight, and of a value of bf16 KV
SCALE_BYTES = 4  # FP8 KV has one fp32 scale per head and token, of K and of V


@dataclass(frozen=True, slots=True)
class StepShape:
    """The sizes that a step's cost depends on. Tokens that it writes count as read."""

    rows: int  # tokens whose KV it writes
    sampled: int  # rows whose logits are needed
    kv_read: int  # tokens whose KV is read, each node once
    kv_read_unshared: int  # the same if every sequence reads its whole path separately
    pairs: int  # (query, visible key) pairs
    segments: int = 0  # nodes whose KV is read, not counting the leaves of decoding rollouts


@dataclass(frozen=True)
class StepWork:
    """Bytes and FLOPs of a decoder's steps; `kv_dtype` is "bf16" or "fp8"."""

    decoder: DecoderConfig
    kv_dtype: str = "bf16"

    @property
    def layer_values(self) -> int:
        """Number of weights in the linear layers, without the output projection."""
        d = self.decoder
        attention = d.hidden * d.head_dim * (2 * d.heads + 2 * d.kv_heads)
        return d.layers * (attention + 3 * d.hidden * d.mlp_width)

    @property
    def head_values(self) -> int:
        """Number of weights in the output projection, from hidden states to logits."""
        return self.decoder.hidden * self.decoder.vocab_size

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of one token's K and V over all layers."""
        if self.kv_dtype == "bf16":
            return self.decoder.kv_bytes_per_token(VALUE_BYTES)
        scales = 2 * self.decoder.layers * self.decoder.kv_heads * SCALE_BYTES
        return self.decoder.kv_bytes_per_token(1) + scales

    def linear_bytes(self, shape: StepShape) -> int:
        """Bytes of weights and of the rows' embeddings."""
        head = self.head_values if shape.sampled else 0
        return VALUE_BYTES * (self.layer_values + head + shape.rows * self.decoder.hidden)

    def linear_flops(self, shape: StepShape) -> int:
        return 2 * (shape.rows * self.layer_values + shape.sampled * self.head_values)

    def attention_bytes(self, shape: StepShape, shared_reads: bool = True) -> int:
        """Bytes of KV read and written."""
        read = shape.kv_read if shared_reads else shape.kv_read_unshared
        return (read + shape.rows) * self.kv_token_bytes

    def attention_flops(self, shape: StepShape) -> int:
        """FLOPs of QK and PV: 2 each per element of a head, query head, pair and layer."""
        return 4 * self.decoder.layers * self.decoder.heads * self.decoder.head_dim * shape.pairs

    def bytes(self, shape: StepShape, steps: int = 1, shared_reads: bool = True) -> int:
        """Bytes of `steps` consecutive decode steps, the first with this shape."""
        growth = shape.rows * self.kv_token_bytes * (steps * (steps - 1) // 2)
        first = self.linear_bytes(shape) + self.attention_bytes(shape, shared_reads)
        return steps * first + growth

    def flops(self, shape: StepShape, steps: int = 1) -> int:
        """FLOPs of `steps` consecutive decode steps, the first with this shape."""
        per_pair = self.attention_flops(StepShape(0, 0, 0, 0, 1))
        first = self.linear_flops(shape) + self.attention_flops(shape)
        return steps * first + per_pair * shape.rows * (steps * (steps - 1) // 2)


class CostModel(Protocol):
    """The time of steps; `work` has their bytes and FLOPs."""

    @property
    def work(self) -> StepWork: ...

    @property
    def shared_reads(self) -> bool: ...

    def seconds(self, shape: StepShape, steps: int = 1) -> float:
        """Seconds of `steps` consecutive steps, the first with this shape.

        From step to step every row's context grows by one token and nothing else changes. With
        `steps` > 1 every row must therefore be a decoding rollout.
        """
        ...


class RooflineCost:
    """Linear layers, then attention, each limited by its bytes or by its FLOPs."""

    def __init__(self, work: StepWork, machine: Machine, shared_reads: bool = True) -> None:
        self.work = work
        self.machine = machine
        self.shared_reads = shared_reads
        self._per_byte = 1 / machine.bytes_per_s
        self._per_flop = 1 / machine.linear_flops_per_s
        self._per_attention_flop = 1 / machine.attention_flops_per_s
        self._growth_bytes = work.kv_token_bytes * self._per_byte  # seconds per row and step
        pair = work.attention_flops(StepShape(0, 0, 0, 0, 1))
        self._growth_flops = pair * self._per_attention_flop

    def seconds(self, shape: StepShape, steps: int = 1) -> float:
        """As CostModel.seconds, in closed form."""
        work = self.work
        linear = max(
            work.linear_bytes(shape) * self._per_byte, work.linear_flops(shape) * self._per_flop
        )
        moved = work.attention_bytes(shape, self.shared_reads) * self._per_byte
        computed = work.attention_flops(shape) * self._per_attention_flop
        attention = sum_of_larger(
            (moved, shape.rows * self._growth_bytes),
            (computed, shape.rows * self._growth_flops),
            steps,
        )
        return steps * (linear + self.machine.overhead_s) + attention


def sum_of_larger(a: tuple[float, float], b: tuple[float, float], count: int) -> float:
    """Sum over j in [0, count) of max(a[0] + j * a[1], b[0] + j * b[1])."""
    if a[0] < b[0]:
        a, b = b, a
    crossing = count  # the first j for which b is larger
    if b[1] > a[1]:
        crossing = min(count, ceil((a[0] - b[0]) / (b[1] - a[1])))
    rest = count - crossing
    return _sum(*a, crossing) + _sum(b[0] + crossing * b[1], b[1], rest)


def steps_until(seconds: Callable[[int], float], target: float, limit: int) -> int:
    """The smallest number of steps, at most `limit`, that takes `target` seconds or more.

    `seconds` must be non-decreasing.
    """
    low, high = 1, limit
    while low < high:
        middle = (low + high) // 2
        if seconds(middle) >= target:
            high = middle
        else:
            low = middle + 1
    return low


def weight_bytes(config: Config) -> int:
    """Bytes of all weights in bf16, without norms and biases."""
    work = StepWork(config.decoder)
    embeddings = work.head_values * (1 if config.decoder.tied_embeddings else 2)
    vision = _vision_values(config.vision, config.decoder.hidden) if config.vision else 0
    return VALUE_BYTES * (work.layer_values + embeddings + vision)


def kv_capacity(config: Config, machine: Machine, kv_dtype: str = "bf16") -> int:
    """Tokens of KV that fit in memory with the weights; <= 0 if the weights leave no room."""
    room = machine.memory_bytes * machine.memory_share - machine.workspace_bytes
    return int((room - weight_bytes(config)) // StepWork(config.decoder, kv_dtype).kv_token_bytes)


def _vision_values(vision: VisionConfig, hidden: int) -> int:
    """Number of weights in the tower's blocks and the projector, as published (not folded)."""
    block = 4 * vision.width**2 + 2 * vision.width * vision.mlp_width
    convolutions = 9 * vision.width * 2 * vision.width + 9 * (2 * vision.width) * (4 * vision.width)
    return vision.layers * block + convolutions + 4 * vision.width * hidden


def _sum(start: float, step: float, count: int) -> float:
    return count * start + step * (count * (count - 1) / 2)
