"""What the compiler made of a kernel: registers, spills, shared memory, occupancy, load widths.

Registers and the stack come from the cubin (cuobjdump), the rest from PTX and Triton's metadata:
ptxas neither widens nor narrows an access. `instruction_mix` reads the SASS itself (nvdisasm).
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

from triton import knobs
from triton.compiler import CompiledKernel

from kernels._tiles import Gpu

# Of an SM, sm_80 and sm_90 alike. Registers are given to a warp in units of 256 and lie in four
# partitions, each with a quarter of the warps.
REGISTERS_PARTITION, REGISTER_UNIT, PARTITIONS = 16384, 256, 4
MAX_WARPS, MAX_PROGRAMS = 64, 32
SHARED_UNIT, SHARED_RESERVED = 128, 1024

# The bytes that loads of the narrowest width, and all narrower ones, carry at least to be counted.
BULK_SHARE = 0.1


@dataclass(frozen=True)
class Figures:
    """Of one compiled kernel."""

    registers: int  # of a thread
    spill_bytes: int  # of a thread: its stack frame, which only spills (or local arrays) need
    shared_bytes: int
    programs_per_sm: int
    wgmma: bool  # matrix products by warp groups (sm_90)
    tma: bool  # bulk tensor copies (sm_90)
    min_load_bytes: int | None  # see `min_load_bytes`


def figures(kernel: CompiledKernel, gpu: Gpu) -> Figures:
    """The figures of `kernel`, compiled for `gpu`'s architecture."""
    used = resource_usage(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    shared = kernel.metadata.shared
    return Figures(
        registers=used["REG"],
        spill_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=shared,
        programs_per_sm=programs_per_sm(used["REG"], shared, kernel.metadata.num_warps, gpu),
        wgmma="wgmma.mma_async" in ptx,
        tma="cp.async.bulk.tensor" in ptx,
        min_load_bytes=min_load_bytes(load_bytes(ptx)),
    )


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL and more, in bytes, as cuobjdump finds them."""
    text = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin)
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", text)}


def programs_per_sm(registers: int, shared_bytes: int, num_warps: int, gpu: Gpu) -> int:
    """How many programs of a kernel an SM holds at once; 0 if not even one fits."""
    of_warp = -(-max(registers, 1) * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS_PARTITION // of_warp * PARTITIONS // num_warps
    of_program = -(-shared_bytes // SHARED_UNIT) * SHARED_UNIT + SHARED_RESERVED
    by_shared = gpu.shared_bytes_sm // of_program
    return min(by_registers, by_shared, MAX_WARPS // num_warps, MAX_PROGRAMS)


def load_bytes(ptx: str) -> dict[int, int]:
    """Bytes that the global loads in a thread's program text carry, by the loads' width in bytes.

    Each instruction counts once, in a loop or not. Copies to shared memory (cp.async) count, bulk
    tensor copies do not: their width is the hardware's affair.
    """
    found: Counter[int] = Counter()
    for vector, bits in re.findall(r"\bld\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx):
        width = int(vector or 1) * int(bits) // 8
        found[width] += width
    for width in re.findall(r"\bcp\.async\.c[ag]\.[^;]*?\],\s*\[[^]]*\],\s*(0x\w+|\d+)", ptx):
        found[int(width, 0)] += int(width, 0)
    return dict(sorted(found.items()))


def min_load_bytes(loads: dict[int, int]) -> int | None:
    """The width of the narrowest loads that matter; None without loads.

    Narrow loads that together carry less than BULK_SHARE of a thread's bytes (page numbers,
    lengths, scales) are passed over; a tensor whose 16-byte loads fall apart carries more.
    """
    total, below = sum(loads.values()), 0
    for width, carried in sorted(loads.items()):
        below += carried
        if below >= BULK_SHARE * total:
            return width
    return None


MIX = {
    "wgmma": r"[HIQB]GMMA",
    "mma": r"[HIQBD]MMA",
    "TMA load": "UTMALDG",
    "TMA store": "UTMASTG",
    "load 16": r"LDG\S*\.128",
    "load 8": r"LDG\S*\.64",
    "load 4": r"LDG(?!STS)(?!\S*\.(128|64|[US]8|[US]16))",
    "load 1, 2": r"LDG\S*\.[US](8|16)",
    "copy 16": r"LDGSTS\S*\.128",
    "copy 8": r"LDGSTS\S*\.64",
    "copy 4": r"LDGSTS(?!\S*\.(128|64))",
    "store": "STG",
    "shared load": r"LDS",
    "shared store": r"STS",
    "spill": r"(LDL|STL)",
    "MUFU": "MUFU",
    "shuffle": "SHFL",
    "barrier": r"BAR\b",
}


def instruction_mix(cubin: bytes) -> dict[str, int]:
    """How often each class of MIX stands in the SASS; classes that do not are left out."""
    text = _output(knobs.nvidia.nvdisasm.path, "-c", cubin)
    return count_mix(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", text, re.M))


def count_mix(instructions: list[str]) -> dict[str, int]:
    """Of instruction names such as "LDG.E.128", those of each class; each name is of one class."""
    counts = Counter(
        next((name for name, pattern in MIX.items() if re.match(pattern, instruction)), "other")
        for instruction in instructions
    )
    return {name: counts[name] for name in (*MIX, "other") if counts[name]}


def _output(tool: str, option: str, cubin: bytes) -> str:
    """What one of the CUDA tools says of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
    return done.stdout
