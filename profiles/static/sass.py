"""Statistics of a compiled kernel: registers, spills, shared memory, occupancy, load widths.

Registers and the stack come from the cubin (cuobjdump); loads, wgmma and tma from PTX, whose
accesses ptxas neither widens nor narrows; shared memory from Triton's metadata. `sass` returns the
machine code (nvdisasm), and `count_mix` counts its instructions by class.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

from triton import knobs
from triton.compiler import CompiledKernel

from kernels.runtime.arithmetic import cdiv
from kernels.runtime.configs import Gpu

# An SM of sm_80 or sm_90. Registers are allocated per warp in units of 256, from four partitions
# that each hold a quarter of the warps.
REGISTERS_PARTITION, REGISTER_UNIT, PARTITIONS = 16384, 256, 4
MAX_WARPS, MAX_PROGRAMS = 64, 32
SHARED_UNIT, SHARED_RESERVED = 128, 1024

# The share of a thread's bytes that loads up to a width must carry for that width to matter.
BULK_SHARE = 0.1
WIDE = 16  # bytes; one instruction of a warp then loads 512
SCALAR_BYTES = {"i1": 1, "i8": 1, "i16": 2, "f16": 2, "bf16": 2, "i32": 4, "f32": 4, "i64": 8}


@dataclass(frozen=True)
class KernelStats:
    """Statistics of one compiled kernel."""

    registers: int  # per thread
    spill_bytes: int  # per thread: its stack frame, which only spills (or local arrays) need
    shared_bytes: int
    programs_per_sm: int
    wgmma: bool  # warpgroup matrix products (sm_90)
    tma: bool  # bulk tensor copies (sm_90)
    min_load_bytes: int | None  # width of the narrowest loads that matter; None without loads
    wide_loads: float | None  # the share of loaded bytes that loads of 16 bytes or more carry


def kernel_stats(kernel: CompiledKernel, gpu: Gpu) -> KernelStats:
    """The statistics of `kernel`, compiled for `gpu`'s architecture."""
    used = resource_usage(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    loads = load_bytes(ptx, kernel.asm["ttgir"])
    shared = kernel.metadata.shared
    return KernelStats(
        registers=used["REG"],
        spill_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=shared,
        programs_per_sm=programs_per_sm(used["REG"], shared, kernel.metadata.num_warps, gpu),
        wgmma="wgmma.mma_async" in ptx,
        tma="cp.async.bulk.tensor" in ptx,
        min_load_bytes=min_load_bytes(loads),
        wide_loads=wide_loads(loads),
    )


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL and more, as cuobjdump reports them; sizes in bytes."""
    text = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin)
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", text)}


def programs_per_sm(registers: int, shared_bytes: int, num_warps: int, gpu: Gpu) -> int:
    """The number of a kernel's programs that fit on an SM at once; 0 if none fits."""
    warp_registers = cdiv(max(registers, 1) * 32, REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS_PARTITION // warp_registers * PARTITIONS // num_warps
    program_bytes = cdiv(shared_bytes, SHARED_UNIT) * SHARED_UNIT + SHARED_RESERVED
    by_shared = gpu.shared_bytes_sm // program_bytes
    return min(by_registers, by_shared, MAX_WARPS // num_warps, MAX_PROGRAMS)


def load_bytes(ptx: str, ttgir: str) -> dict[int, int]:
    """Bytes that a thread's code loads from tensors, by the width of the loads in bytes.

    Each instruction counts once, in a loop or not. Copies to shared memory (cp.async) count. Bulk
    tensor copies do not: the hardware chooses their width. Neither do scalars (lengths, page
    numbers), which all threads load from one address; TTGIR shows which loads those are.
    """
    carried: Counter[int] = Counter()
    for vector, bits in re.findall(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx):
        width = int(vector or 1) * int(bits) // 8
        carried[width] += width
    for width in re.findall(r"\bcp\.async\.c[ag]\.[^;]*?\],\s*\[[^]]*\],\s*(0x\w+|\d+)", ptx):
        carried[int(width, 0)] += int(width, 0)
    for kind in re.findall(r"\btt\.load .*: !tt\.ptr<(\w+)>", ttgir):
        width = SCALAR_BYTES.get(kind, 1)
        carried[width] -= width
    return {width: size for width, size in sorted(carried.items()) if size > 0}


def min_load_bytes(loads: dict[int, int]) -> int | None:
    """The width of the narrowest loads that matter; None without loads.

    Loads up to a width matter if they carry BULK_SHARE of the bytes. A few narrow loads among wide
    ones do not; a tensor whose wide loads were split up does.
    """
    total, below = sum(loads.values()), 0
    for width, carried in sorted(loads.items()):
        below += carried
        if below >= BULK_SHARE * total:
            return width
    return None


def wide_loads(loads: dict[int, int]) -> float | None:
    """The share of bytes that loads of at least WIDE bytes carry; None without loads."""
    total = sum(loads.values())
    wide = sum(carried for width, carried in loads.items() if width >= WIDE)
    return round(wide / total, 2) if total else None


MIX = {
    "wgmma": r"[HIQB]GMMA",
    "mma": r"[HIQBD]MMA",
    "TMA load": "UTMALDG",
    "TMA store": "UTMASTG",
    "load 16": r"LDG\.(\S*\.)?128\b",
    "load 8": r"LDG\.(\S*\.)?64\b",
    "load 1, 2": r"LDG\.\S*[US](8|16)\b",
    "load 4": r"LDG\.",
    "copy 16": r"LDGSTS\.(\S*\.)?128\b",
    "copy 8": r"LDGSTS\.(\S*\.)?64\b",
    "copy 4": r"LDGSTS\.",
    "store": "STG",
    "shared load 1, 2": r"LDS\.\S*[US](8|16)\b",
    "shared load": r"LDS",
    "shared store": r"STS",
    "spill": r"(LDL|STL)",
    "MUFU": "MUFU",
    "shuffle": "SHFL",
    "barrier": r"BAR\b",
    "F2F": r"F2F\b",
    "wgmma wait": r"WARPGROUP\.DEPBAR\S* gsb0, 0x0",  # until no product is pending
    "copy wait": r"DEPBAR",
}


def sass(cubin: bytes) -> str:
    """The instructions of a cubin, with their branch labels."""
    return _output(knobs.nvidia.nvdisasm.path, "-c", cubin)


def count_mix(instructions: list[str]) -> dict[str, int]:
    """Count instruction names such as "LDG.E.128" by class: the first class that matches a name."""
    counts = Counter(
        next((name for name, pattern in MIX.items() if re.match(pattern, instruction)), "other")
        for instruction in instructions
    )
    return {name: counts[name] for name in (*MIX, "other") if counts[name]}


def _output(tool: str, option: str, cubin: bytes) -> str:
    """The output of one of the CUDA tools for a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout
