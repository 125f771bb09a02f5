"""What a step of the decoder costs: bytes and FLOPs from its shape, and the seconds they take.

The linear layers read every weight once per step, whatever its rows. Attention reads the KV of the
nodes that its rows can see: every node once (shared reads), or once for every row (what an engine
does that knows no tree). Not counted: activations, which stay in the cache at decode, norms and
sampling (in a machine's overhead), and the vision tower, which runs beside decode.
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
    """What a step does, in numbers. Tokens that it writes count as read."""

    rows: int  # tokens whose KV it writes
    sampled: int  # rows whose logits are needed
    kv_read: int  # tokens whose KV is read, each node once
    kv_read_unshared: int  # the same if every sequence reads its whole path itself
    pairs: int  # of a query and a key that it sees
    segments: int = 0  # nodes whose KV is read, the decoding rollouts' own ones not counted


@dataclass(frozen=True)
class StepWork:
    """Bytes and FLOPs of steps of one decoder; `kv_dtype` is "bf16" or "fp8"."""

    decoder: DecoderConfig
    kv_dtype: str = "bf16"

    @property
    def layer_values(self) -> int:
        """Weights of the linear layers, the vocabulary's excepted."""
        d = self.decoder
        attention = d.hidden * d.head_dim * (2 * d.heads + 2 * d.kv_heads)
        return d.layers * (attention + 3 * d.hidden * d.mlp_width)

    @property
    def head_values(self) -> int:
        """Weights that turn hidden states into logits."""
        return self.decoder.hidden * self.decoder.vocab_size

    @property
    def kv_token_bytes(self) -> int:
        """Bytes of one token's K and V over all layers."""
        if self.kv_dtype == "bf16":
            return self.decoder.kv_bytes_per_token(VALUE_BYTES)
        scales = 2 * self.decoder.layers * self.decoder.kv_heads * SCALE_BYTES
        return self.decoder.kv_bytes_per_token(1) + scales

    def linear_bytes(self, shape: StepShape) -> int:
        """Weights, and the embeddings of the rows."""
        head = self.head_values if shape.sampled else 0
        return VALUE_BYTES * (self.layer_values + head + shape.rows * self.decoder.hidden)

    def linear_flops(self, shape: StepShape) -> int:
        return 2 * (shape.rows * self.layer_values + shape.sampled * self.head_values)

    def attention_bytes(self, shape: StepShape, shared_reads: bool = True) -> int:
        """KV read and KV written."""
        read = shape.kv_read if shared_reads else shape.kv_read_unshared
        return (read + shape.rows) * self.kv_token_bytes

    def attention_flops(self, shape: StepShape) -> int:
        """Of both products, 2 FLOPs per value of a head, query head, pair and layer."""
        return 4 * self.decoder.layers * self.decoder.heads * self.decoder.head_dim * shape.pairs

    def bytes(self, shape: StepShape, steps: int = 1, shared_reads: bool = True) -> int:
        """Bytes of `steps` decode steps in a row, of which the first has this shape."""
        growth = shape.rows * self.kv_token_bytes * (steps * (steps - 1) // 2)
        first = self.linear_bytes(shape) + self.attention_bytes(shape, shared_reads)
        return steps * first + growth

    def flops(self, shape: StepShape, steps: int = 1) -> int:
        """FLOPs of `steps` decode steps in a row, of which the first has this shape."""
        per_pair = self.attention_flops(StepShape(0, 0, 0, 0, 1))
        first = self.linear_flops(shape) + self.attention_flops(shape)
        return steps * first + per_pair * shape.rows * (steps * (steps - 1) // 2)


class CostModel(Protocol):
    """Seconds of steps. What was moved and computed is in `work`."""

    work: StepWork
    shared_reads: bool

    def seconds(self, shape: StepShape, steps: int = 1) -> float:
        """Seconds of `steps` steps in a row, of which the first has this shape.

        From one to the next nothing changes but that every row's context is a token longer, so
        with more than one step every row must be a rollout that decodes.
        """
        ...


class RooflineCost:
    """Linear layers and attention one after the other, each bound by its bytes or its FLOPs."""

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
    crossing = count  # from here on b is the larger one
    if b[1] > a[1]:
        crossing = min(count, ceil((a[0] - b[0]) / (b[1] - a[1])))
    rest = count - crossing
    return _sum(*a, crossing) + _sum(b[0] + crossing * b[1], b[1], rest)


def steps_until(seconds: Callable[[int], float], target: float, limit: int) -> int:
    """The fewest steps, at most `limit`, that take `target` seconds; `seconds` never falls."""
    low, high = 1, limit
    while low < high:
        middle = (low + high) // 2
        if seconds(middle) >= target:
            high = middle
        else:
            low = middle + 1
    return low


def weight_bytes(config: Config) -> int:
    """Bytes of all weights in bf16, norms and biases not counted."""
    work = StepWork(config.decoder)
    embeddings = work.head_values * (1 if config.decoder.tied_embeddings else 2)
    vision = _vision_values(config.vision, config.decoder.hidden) if config.vision else 0
    return VALUE_BYTES * (work.layer_values + embeddings + vision)


def kv_capacity(config: Config, machine: Machine, kv_dtype: str = "bf16") -> int:
    """Tokens of KV that fit beside the weights; 0 or less if the weights alone do not."""
    room = machine.memory_bytes * machine.memory_share - machine.workspace_bytes
    return int((room - weight_bytes(config)) // StepWork(config.decoder, kv_dtype).kv_token_bytes)


def _vision_values(vision: VisionConfig, hidden: int) -> int:
    """Weights of the tower's blocks and of the projector as it is published."""
    block = 4 * vision.width**2 + 2 * vision.width * vision.mlp_width
    convolutions = 9 * vision.width * 2 * vision.width + 9 * (2 * vision.width) * (4 * vision.width)
    return vision.layers * block + convolutions + 4 * vision.width * hidden


def _sum(start: float, step: float, count: int) -> float:
    return count * start + step * (count * (count - 1) / 2)
