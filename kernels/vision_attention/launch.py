"""The Triton form of vision attention: geometry of a batch of views, tile choices, two launches.

rows        queries of one head and view at a time
block       keys at a time
num_warps, num_stages
tma         1: whole blocks by tensor copies (sm_90), where rows begin on 16 bytes
specialize  1: a warp group copies while two compute (sm_90, with tma and four warps named)
turn_q      1: queries are rotated where they are used, keys alone by the first launch
"""

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.runtime.arithmetic import cdiv
from kernels.runtime.configs import Gpu, KernelConfig, Tunable, gpu_of
from kernels.runtime.dispatch import check, copyable
from kernels.runtime.dtypes import DTYPES
from kernels.runtime.grids import Grid
from kernels.runtime.tensor_cache import cached_tensors
from kernels.vision_attention.kernel import Parts, vision_attention_kernel
from kernels.vision_attention.rotation import rotate_kernel

OP = "vision_attention"
MAX_DIM = 128  # of a head: wider ones do not fit the registers
LEAST = 16  # side of a matrix product's tile
ROTATE_ROWS, ROTATE_HEADS = 32, 4


def launch(qkv: Tensor, grids: Sequence[Grid], heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """qkv [T, 3 * H * D] with the rotary table of the views' largest side -> [T, H * D]."""
    dim = qkv.shape[1] // (3 * heads)
    check(dim <= MAX_DIM, f"vision_attention: head_dim is at most {MAX_DIM} in Triton, not {dim}")
    check(qkv.dtype in DTYPES, f"vision_attention: fp32, bf16 or fp16, not {qkv.dtype}")
    check(qkv.stride(1) == 1, "vision_attention: qkv must have neighbouring columns (stride 1)")
    out = qkv.new_empty(len(qkv), heads * dim)
    if not len(qkv):
        return out
    parts = Parts.of(dim)
    chosen = _config_of(qkv, dim)
    rows, block = chosen["rows"], chosen["block"]
    places, work = _geometry(tuple(map(tuple, grids)), rows, qkv.device)
    turn_q = bool(chosen["turn_q"])
    tma = chosen["tma"] and copyable(qkv)
    specialize = bool(tma and chosen["specialize"])
    check(not (specialize and turn_q), "vision_attention: specialize and turn_q exclude each other")
    copies_q = tma and not specialize and not turn_q
    turned = _rotated(qkv, places, cos, sin, heads, dim, parts, turn_q)
    if specialize:  # the kernel makes descriptors of its own, and the launch gets them memory
        triton.set_allocator(_memory)
    vision_attention_kernel[(len(work) * heads,)](
        turned,
        qkv,
        places,
        cos,
        sin,
        *(_descriptors(turned, parts, rows) if copies_q else (None, None)),
        *(_descriptors(turned, parts, block) if tma else (None, None)),
        *(_descriptors(qkv, parts, block) if tma else (None, None)),
        out,
        work,
        row_stride=qkv.stride(0),
        qk_scale=dim**-0.5 * math.log2(math.e),
        HEADS=heads,
        D=dim,
        FIRST=parts.first,
        REST=parts.rest,
        ROWS=rows,
        BLOCK=block,
        SHORT=0 if specialize or rows <= LEAST else LEAST,
        TAIL=max(LEAST, triton.next_power_of_2(max(r * c % block for r, c in grids))),
        TMA=bool(tma),
        SPECIALIZE=specialize,
        TURN_Q=turn_q,
        num_warps=chosen["num_warps"],
        num_stages=chosen["num_stages"],
        maxnreg=_most_registers(chosen, parts, gpu_of(qkv.device)),
    )
    return out


def _most_registers(chosen: KernelConfig, parts: Parts, gpu: Gpu) -> int | None:
    """The limit with which two programs fit an SM of sm_90 that also rotate their queries.

    Heads of 64 + 32 take 144 registers without it, and spill none of the 128 with it, but ptxas
    then runs one product at a time. All other heads, fewer rows and larger blocks lose no program
    to the rotation.
    """
    tight = tuple(parts) == (64, 32) and chosen["block"] <= 64 and chosen["num_warps"] == 8
    return 128 if chosen["turn_q"] and tight and gpu.arch >= 90 else None


def _memory(size: int, alignment: int, stream: int | None) -> Tensor:
    """For a launch, on the device that it is for; PyTorch aligns to more than any kernel asks."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _rotated(
    qkv: Tensor,
    places: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    dim: int,
    parts: Parts,
    turn_q: bool,
) -> Tensor:
    """Rotated Q and K [T, 2 * H * padded D]; with `turn_q`, K alone."""
    count = heads if turn_q else 2 * heads
    turned = qkv.new_empty(len(qkv), count * parts.padded)
    group = math.gcd(count, ROTATE_HEADS)
    rotate_kernel[(cdiv(len(qkv), ROTATE_ROWS) * (count // group),)](
        qkv,
        turned,
        places,
        cos,
        sin,
        tokens=len(qkv),
        row_stride=qkv.stride(0),
        HEADS=heads,
        D=dim,
        FIRST=parts.first,
        REST=parts.rest,
        ROWS=ROTATE_ROWS,
        GROUP=group,
        TURN_Q=turn_q,
    )
    return turned


@cached_tensors(maxsize=64)
def _geometry(grids: tuple[Grid, ...], rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row << 16 | column of every token, int32 [T]; and tiles of `rows` queries, int32 [tiles, 3].

    A tile is its first token and its view's first and last + 1. Tiles of large views come first:
    the small ones then fill what these leave idle at the end.
    """
    check(max(max(grid) for grid in grids) < 2**15, "vision_attention: sides are below 32768")
    places, work, start = [], [], 0
    for r, c in grids:
        places.append((torch.arange(r)[:, None] << 16 | torch.arange(c)).flatten())
        end = start + r * c
        work += [(first, start, end) for first in range(start, end, rows)]
        start = end
    work.sort(key=lambda tile: tile[1] - tile[2])  # stable: a view's tiles stay together
    return torch.cat(places).to(device, torch.int32), torch.tensor(work).to(device, torch.int32)


def _descriptors(
    x: Tensor, parts: Parts, rows: int
) -> tuple[TensorDescriptor, TensorDescriptor | None]:
    """Of tiles of `rows` rows and the first or second part of a head."""

    def of(width: int) -> TensorDescriptor:
        return TensorDescriptor(x, x.shape, x.stride(), [rows, width])

    return of(parts.first), of(parts.rest) if parts.rest else None


def _config_of(qkv: Tensor, dim: int) -> KernelConfig:
    few = triton.next_power_of_2(len(qkv))
    size = f"T<={few}" if few <= 4096 else "T>4096"
    key = f"D{dim} {size}" + " fp32" * (qkv.dtype == torch.float32)
    return TUNABLE.choose(key, qkv.device, key)


def _rule(gpu: Gpu, key: str) -> KernelConfig:
    """Choices without measurements; `python -m profiles static` shows what becomes of them.

    128 queries at a time: for 64, keys and values would have to come from L2 faster than it can.
    64 keys: on sm_90 two programs then fit an SM, and one exponentiates while the other multiplies.
    fp32 is for tests.
    """
    wide = key.endswith("fp32")
    return {
        "rows": 32 if wide else 128,
        "block": 32 if wide else 64,
        "num_warps": 4 if wide else 8,
        "num_stages": 2 if wide else 3,
        "tma": 0,
        "specialize": 0,
        "turn_q": 0,
    }


def _candidates(key: str, gpu: Gpu) -> list[KernelConfig]:
    """The rule, then its kin."""
    rule = _rule(gpu, key)
    kin = [{"num_stages": 2}, {"num_stages": 4}, {"block": 32, "num_stages": 4}]
    spills = key.startswith("D128")
    kin += [] if spills else [{"rows": 64, "num_warps": 4}]  # for batches that leave SMs idle
    if gpu.arch >= 90:
        longer = {"block": 128, "num_stages": 2}
        specialized = {"tma": 1, "specialize": 1, "num_warps": 4}
        kin += [longer, {"tma": 1}, longer | {"tma": 1}]
        # On sm_80 the loop would be 40 % longer: rotated queries stay in registers there. Of heads
        # only the model's have been looked at.
        turned = [{}, {"tma": 1}, longer, {"rows": 64, "num_warps": 4}]
        kin += [one | {"turn_q": 1} for one in turned if key.startswith("D96")]
        kin += [specialized, longer | specialized]
        kin += [] if spills else [{"rows": 256} | specialized]
    candidates = [rule, *(rule | change for change in kin)]
    return [one for at, one in enumerate(candidates) if one not in candidates[:at]]


TUNABLE = Tunable("vision_attention", _rule, _candidates)
