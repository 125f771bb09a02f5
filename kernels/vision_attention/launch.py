"""The launcher of vision attention's Triton form: row tiles of the views, kernel configs, launches.

rows        queries of a row tile, of one head and view
block       tokens of a KV block
num_warps, num_stages
tma         1: whole blocks by tensor copies (sm_90), where rows are aligned to 16 bytes
specialize  1: one warp group copies while two compute (sm_90; needs tma and num_warps 4)
turn_q      1: queries are rotated where they are used, and the first launch rotates only keys
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
MAX_DIM = 128  # head_dim: larger ones do not fit in the registers
MIN_ROWS = 16  # the least side of a tensor-core product
ROTATE_ROWS, ROTATE_HEADS = 32, 4


def launch(qkv: Tensor, grids: Sequence[Grid], heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """qkv [T, 3 * H * D] -> [T, H * D]; cos and sin cover the views' largest side."""
    dim = qkv.shape[1] // (3 * heads)
    check(
        dim <= MAX_DIM, f"vision_attention: head_dim must be at most {MAX_DIM} in Triton, not {dim}"
    )
    check(qkv.dtype in DTYPES, f"vision_attention: qkv must be fp32, bf16 or fp16, not {qkv.dtype}")
    check(qkv.stride(1) == 1, "vision_attention: qkv must have neighbouring columns (stride 1)")
    out = qkv.new_empty(len(qkv), heads * dim)
    if not len(qkv):
        return out
    parts = Parts.of(dim)
    config = _config_of(qkv, dim)
    rows, block = config["rows"], config["block"]
    coords, tiles = _geometry(tuple(map(tuple, grids)), rows, qkv.device)
    turn_q = bool(config["turn_q"])
    tma = config["tma"] and copyable(qkv)
    specialize = bool(tma and config["specialize"])
    check(not (specialize and turn_q), "vision_attention: specialize and turn_q exclude each other")
    copies_q = tma and not specialize and not turn_q
    turned = _rotated(qkv, coords, cos, sin, heads, dim, parts, turn_q)
    if specialize:  # the kernel creates descriptors itself and needs memory for them
        triton.set_allocator(_allocate)
    vision_attention_kernel[(len(tiles) * heads,)](
        turned,
        qkv,
        coords,
        cos,
        sin,
        *(_descriptors(turned, parts, rows) if copies_q else (None, None)),
        *(_descriptors(turned, parts, block) if tma else (None, None)),
        *(_descriptors(qkv, parts, block) if tma else (None, None)),
        out,
        tiles,
        row_stride=qkv.stride(0),
        qk_scale=dim**-0.5 * math.log2(math.e),
        HEADS=heads,
        D=dim,
        FIRST=parts.first,
        REST=parts.rest,
        ROWS=rows,
        BLOCK=block,
        SHORT=0 if specialize or rows <= MIN_ROWS else MIN_ROWS,
        TAIL=max(MIN_ROWS, triton.next_power_of_2(max(r * c % block for r, c in grids))),
        TMA=bool(tma),
        SPECIALIZE=specialize,
        TURN_Q=turn_q,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        maxnreg=_max_registers(config, parts, gpu_of(qkv.device)),
    )
    return out


def _max_registers(config: KernelConfig, parts: Parts, gpu: Gpu) -> int | None:
    """The register limit with which two CTAs that rotate their queries fit on an SM of sm_90.

    Heads of 64 + 32 take 144 registers without the limit. With its 128 nothing spills, but ptxas
    then runs one matrix product at a time. Other heads, fewer rows or larger blocks need no limit:
    the rotation does not cost them a CTA.
    """
    tight = tuple(parts) == (64, 32) and config["block"] <= 64 and config["num_warps"] == 8
    return 128 if config["turn_q"] and tight and gpu.arch >= 90 else None


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for a launch, on its device; PyTorch's alignment exceeds what any kernel needs."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _rotated(
    qkv: Tensor,
    coords: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    dim: int,
    parts: Parts,
    turn_q: bool,
) -> Tensor:
    """Rotated Q and K [T, 2 * H * padded D]; with `turn_q`, only K."""
    count = heads if turn_q else 2 * heads
    turned = qkv.new_empty(len(qkv), count * parts.padded)
    group = math.gcd(count, ROTATE_HEADS)
    rotate_kernel[(cdiv(len(qkv), ROTATE_ROWS) * (count // group),)](
        qkv,
        turned,
        coords,
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
    """Each token's row << 16 | column, int32 [T]; row tiles of `rows` queries, int32 [tiles, 3].

    A row tile is (its first token, its view's first token, its view's last + 1). Tiles of large
    views come first, so that those of small views fill SMs that would be idle at the end.
    """
    longest = max(max(grid) for grid in grids)
    check(longest < 2**15, f"vision_attention: grid sides must be below 32768, not {longest}")
    coords, tiles, start = [], [], 0
    for r, c in grids:
        coords.append((torch.arange(r)[:, None] << 16 | torch.arange(c)).flatten())
        end = start + r * c
        tiles += [(first, start, end) for first in range(start, end, rows)]
        start = end
    tiles.sort(key=lambda tile: tile[1] - tile[2])  # stable: a view's tiles stay together
    return torch.cat(coords).to(device, torch.int32), torch.tensor(tiles).to(device, torch.int32)


def _descriptors(
    x: Tensor, parts: Parts, rows: int
) -> tuple[TensorDescriptor, TensorDescriptor | None]:
    """Descriptors of [rows, width] tiles, for the first and the second part of a head."""

    def of(width: int) -> TensorDescriptor:
        return TensorDescriptor(x, x.shape, x.stride(), [rows, width])

    return of(parts.first), of(parts.rest) if parts.rest else None


def _config_of(qkv: Tensor, dim: int) -> KernelConfig:
    bucket = triton.next_power_of_2(len(qkv))
    size = f"T<={bucket}" if bucket <= 4096 else "T>4096"
    key = f"D{dim} {size}" + " fp32" * (qkv.dtype == torch.float32)
    return TUNABLE.choose(key, qkv.device, key)


def _rule(gpu: Gpu, key: str) -> KernelConfig:
    """The config without measurements; `python -m profiles static` shows the compiled result.

    128 queries per row tile: with 64, L2 could not deliver keys and values fast enough. 64 keys per
    block: two CTAs then fit on an SM of sm_90, and one exponentiates while the other multiplies.
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
    """The rule's config, then variations of it."""
    rule = _rule(gpu, key)
    changes = [{"num_stages": 2}, {"num_stages": 4}, {"block": 32, "num_stages": 4}]
    spills = key.startswith("D128")
    changes += [] if spills else [{"rows": 64, "num_warps": 4}]  # for batches that leave SMs idle
    if gpu.arch >= 90:
        longer = {"block": 128, "num_stages": 2}
        specialized = {"tma": 1, "specialize": 1, "num_warps": 4}
        changes += [longer, {"tma": 1}, longer | {"tma": 1}]
        # Not on sm_80, where rotated queries stay in registers and the loop would be 40 % longer.
        # Only the model's head_dim has been examined.
        turned = [{}, {"tma": 1}, longer, {"rows": 64, "num_warps": 4}]
        changes += [change | {"turn_q": 1} for change in turned if key.startswith("D96")]
        changes += [specialized, longer | specialized]
        changes += [] if spills else [{"rows": 256} | specialized]
    candidates = [rule, *(rule | change for change in changes)]
    return [config for i, config in enumerate(candidates) if config not in candidates[:i]]


TUNABLE = Tunable("vision_attention", _rule, _candidates)
