"""Every Triton kernel that the ops launch, compiled ahead of time, without a GPU.

The ops' own launchers run on tensors of a CPU; their launches are recorded and compiled for each
architecture: in the tiles that the committed tables choose, in those that the rules choose, and in
every candidate that `python -m bench tune` would measure. A row holds the worst figures over the
launches that share kernel, architecture, dtype and configuration.

`broken_rules` says what must hold of a row, by itself and against the committed baseline.
"""

import ast
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from threading import Lock

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from bench import inputs, tune
from bench.cases import SMOLLM2, Case, cases, in_modes
from bench.inputs import Node, fork
from bench.numerics import form
from kernels.compile.launches import Launch, compiler, launches_recorded
from kernels.compile.unfilled import unfilled
from kernels.errors import ImplError, one_line
from kernels.runtime.configs import (
    A100,
    H200,
    TUNABLES,
    Gpu,
    KernelConfig,
    record_configs,
    use_config,
)
from kernels.runtime.dtypes import dtype_name
from model.terminal import track
from profiles.static import loop_stats
from profiles.static.pipeline import pipelines
from profiles.static.sass import figures, sass
from profiles.static.sass_loop import summarise_sass

Row = dict
GPUS = {gpu.arch: gpu for gpu in (A100, H200)}
WORST = {
    "registers": max,
    "spill_bytes": max,
    "shared_bytes": max,
    "programs_per_sm": min,
    "wgmma": min,
    "tma": min,
    "min_load_bytes": min,
    "wide_loads": min,
}
WIDE_LOADS_SLACK = 0.1
KEY = ("kernel", "arch", "dtype", "config")
DTYPES = (torch.bfloat16, torch.float16)


def _extra(op: str, name: str, **shape: object) -> Case:
    made = partial(getattr(inputs, f"{op}_inputs"), **shape)
    return Case(op, name, made, values=0, flops=0)


# What the op table of a GPU lacks: other heads, forms without a residual, a second result.
SMOLLM2_HEADS = {"heads": 9, "kv_heads": 3, "head_dim": 64}
WIDE_HEADS = {"heads": 64, "kv_heads": 1, "head_dim": 256}
DECODE, PREFILL = (fork(2048, [512] * 16),), (Node(1024, new=512),)
CASES = [
    *cases("cuda"),
    *(
        _extra("prefix_attention", f"{name} D{heads['head_dim']}", forest=forest, **heads)
        for heads in (SMOLLM2_HEADS, WIDE_HEADS)
        for name, forest in (("decode", DECODE), ("prefill", PREFILL))
    ),
    _extra("prefix_attention", "decode with lse", forest=DECODE, return_lse=True),
    replace(
        _extra("prefix_attention", "invariant fp8", forest=DECODE, fp8=True),
        form="triton-invariant",
    ),
    *(
        _extra("rotary_attention", f"decode D{heads['head_dim']}", forest=DECODE, **heads)
        for heads in (SMOLLM2_HEADS, WIDE_HEADS)
    ),
    _extra("rotary_attention", "decode fp8", forest=DECODE, fp8=True),
    *(
        _extra("qk_norm_rope", f"T{rows} D{heads['head_dim']}", rows=rows, **heads)
        for heads in (SMOLLM2_HEADS, WIDE_HEADS)
        for rows in (16, 4096)
    ),
    _extra("rms_norm", "T16 C4096 alone", rows=16, width=4096, residual=False),
    _extra("rms_norm", "T16 smollm2", rows=16, width=SMOLLM2.decoder.hidden),
    _extra("layer_norm", "T1296 C1536 alone", rows=1296, width=1536, residual=False),
    *(
        _extra("vision_attention", f"36x36 D{dim}", grids=[(36, 36)], heads=2, head_dim=dim)
        for dim in (64, 72, 80, 128)
    ),
    _extra("sample", "B1 V151936 k20 p0.95", rows=1, vocab=151_936, top_k=20, top_p=0.95),
]


@dataclass(frozen=True)
class Attempt:
    """One launch in some tiles: what it compiles to, or what went wrong before."""

    op: str
    arch: int
    kernel: str
    dtype: str
    config: str
    compiled: CompiledKernel | None = None  # or what has it as its `result()`
    failure: str | None = None


def sweep(
    ops: Sequence[str], archs: Sequence[int], *, quick: bool = False, mix: bool = False
) -> list[Row]:
    """Rows of `ops` (all if empty) on `archs`, in the order of the cases.

    `quick` takes what tables and rules choose in bf16, and no candidates; `mix` adds the
    instructions by class, of the hot loops too, what each copies ahead, and what to look at.
    """
    sites = [
        (case, dtype, GPUS[arch])
        for dtype in (DTYPES[:1] if quick else DTYPES)
        for case in in_modes(CASES)
        for arch in archs
        if not ops or case.op in ops
    ]
    rows: dict[tuple, Row] = {}
    with (
        _parsed_in_turn(),
        ThreadPoolExecutor(os.cpu_count()) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        attempts = dict.fromkeys(
            attempt for site in track(sites, "recording") for attempt in _attempts(*site, quick)
        )
        for attempt in track(attempts, "compiling"):
            row = _row(attempt, mix)
            key = key_of(row)
            rows[key] = _worse(rows[key], row) if key in rows else row
    return list(rows.values())


def key_of(row: Row) -> tuple:
    return tuple(row[name] for name in KEY)


def broken_rules(rows: Sequence[Row], baseline: Sequence[Row]) -> list[str]:
    """What is wrong with `rows`, a line for each.

    Every row must compile, fit an SM and be known to the baseline. Against the baseline, no spill
    is new, wgmma and tma stay, loads stay as wide, as many programs fit an SM, and each hot loop
    copies as far ahead with as few barriers, waits and instructions; registers may move as long as
    that holds. Where the baseline is by another Triton, whose registers are allocated otherwise,
    only wgmma and tma count.
    """
    before = {key_of(row): row for row in baseline}
    comparable = same_triton(baseline)
    wrong = []
    for row in rows:
        known = before.get(key_of(row))
        if row["failure"]:
            found = [row["failure"]]
        elif known:
            found = [*_unfit(row), *_worsened(row, known)]
        else:
            found = list(_unfit(row))
            if comparable:
                found += [f"{row['spill_bytes']} bytes spilled"] * bool(row["spill_bytes"])
                found += ["not in the baseline; --update puts it there"]
        name = f"{row['kernel']}, sm_{row['arch']}, {row['dtype']}, {row['config']}"
        wrong += [f"{name}: {text}" for text in found]
    return wrong


def same_triton(baseline: Sequence[Row]) -> bool:
    """Whether any row of the baseline was compiled by the Triton that is here."""
    return any(row["triton"] == triton.__version__ for row in baseline)


def update(
    baseline: Sequence[Row], rows: Sequence[Row], ops: Sequence[str], archs: Sequence[int]
) -> list[Row]:
    """The baseline with `rows` for all that it had of `ops` (all if empty) on `archs`."""
    kept = [row for row in baseline if (ops and row["op"] not in ops) or row["arch"] not in archs]
    good = [row for row in rows if not row["failure"]]
    names = (*KEY, *WORST, *loop_stats.WORST, "op", "triton")
    new = [{name: row[name] for name in names} for row in good]
    return sorted([*kept, *new], key=lambda row: (row["op"], *key_of(row)))


@contextmanager
def _parsed_in_turn() -> Iterator[None]:
    """Let one thread at a time parse a kernel's source.

    Python 3.11 may lose count of how deep it is when two do, and then raises SystemError
    (python/cpython#106905).
    """
    parse, lock = JITFunction.parse, Lock()

    def parse_in_turn(kernel: JITFunction) -> ast.Module:
        with lock:
            return parse(kernel)

    JITFunction.parse = parse_in_turn
    try:
        yield
    finally:
        JITFunction.parse = parse


def _unfit(row: Row) -> Iterator[str]:
    limit = GPUS[row["arch"]].shared_bytes
    if row["shared_bytes"] > limit:
        yield f"{row['shared_bytes']} bytes of shared memory, of {limit} that there are"
    elif not row["programs_per_sm"]:
        yield f"no program fits an SM with {row['registers']} registers of each thread"


def _worsened(row: Row, known: Row) -> Iterator[str]:
    """Figures of `row` that are worse than those `known`, before and after."""
    at_least = {"wgmma": known["wgmma"], "tma": known["tma"]}
    same = known["triton"] == row["triton"]
    if same:
        if row["spill_bytes"] > known["spill_bytes"]:
            yield f"spill_bytes {known['spill_bytes']} -> {row['spill_bytes']}"
        at_least |= {name: known[name] or 0 for name in ("min_load_bytes", "programs_per_sm")}
        at_least["wide_loads"] = (known["wide_loads"] or 0) - WIDE_LOADS_SLACK
    for name, least in at_least.items():
        if (row[name] or 0) < least:
            yield f"{name} {known[name]} -> {row[name]}"
    if same:
        yield from loop_stats.worsened(row, known)


def _attempts(case: Case, dtype: torch.dtype, gpu: Gpu, quick: bool) -> Iterator[Attempt]:
    """The case's launches in every choice of tiles, on their way through the compiler."""
    with unfilled():
        arguments = case.inputs(0, torch.device("cpu"), dtype)
    with record_configs() as asked:
        yield from _launched(case, gpu, arguments)
    # A GPU without a table gets the rule's tiles.
    yield from _launched(case, replace(gpu, name="none"), arguments)
    if quick or dtype != DTYPES[0]:
        return
    for part, key in asked:
        for tiles in TUNABLES[part].candidates(key, gpu):
            with use_config(part, **tiles):
                yield from _launched(case, gpu, arguments, tiles)


def _launched(
    case: Case, gpu: Gpu, arguments: dict, tiles: KernelConfig | None = None
) -> list[Attempt]:
    try:
        with launches_recorded(gpu) as launches:
            form(case.op, case.form)(arguments)()
    except ImplError:  # no Triton form yet
        return []
    except Exception as error:  # one choice must not hide the others
        config = f"{case.name} {tune.text(tiles or {})}".strip()
        return [Attempt(case.op, gpu.arch, case.op, "", config, failure=one_line(error))]
    with compiler(gpu):
        return [
            Attempt(
                case.op,
                gpu.arch,
                launch.kernel.fn.__name__,
                _dtype(launch),
                config_of(launch),
                launch.compile(),
            )
            for launch in launches
        ]


def _dtype(launch: Launch) -> str:
    """The floating dtypes of a launch's tensors; fp32 and integers only where there is no other."""
    tensors = [
        value for value in (*launch.args, *launch.kwargs.values()) if isinstance(value, Tensor)
    ]
    names = {dtype_name(tensor.dtype) for tensor in tensors}
    plain = {
        name for name in names if name == "float32" or not name.startswith(("float", "bfloat"))
    }
    return "+".join(sorted(names - plain)) or ("float32" if "float32" in names else "int")


def config_of(launch: Launch) -> str:
    """What sets a compiled kernel apart, as in "BLOCK=1024 -residual num_warps=8 num_stages=3":
    constexprs, absent pointers, options.
    """
    given = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.kwargs
    parts = []
    for parameter in launch.kernel.params:
        value = given.pop(parameter.name, parameter.default)
        if value is None:
            parts.append(f"-{parameter.name}")
        elif hasattr(value, "_asdict"):  # a NamedTuple of arguments
            absent = [name for name, field in value._asdict().items() if field is None]
            parts += [f"-{parameter.name}.{name}" for name in absent]
        elif parameter.is_constexpr:
            value = getattr(value, "value", value)  # of a tl.constexpr
            value = int(value) if isinstance(value, bool) else str(value).replace(" ", "")
            parts.append(f"{parameter.name}={value}")
    given = {"num_warps": 4, "num_stages": 3} | given
    options = (f"{name}={value}" for name, value in given.items() if value is not None)
    return " ".join([*parts, *options])


def _row(attempt: Attempt, mix: bool) -> Row:
    row = {
        "op": attempt.op,
        "kernel": attempt.kernel,
        "arch": attempt.arch,
        "dtype": attempt.dtype,
        "config": attempt.config,
        **dict.fromkeys((*WORST, *loop_stats.WORST)),
        "bytes_to_cover": loop_stats.bytes_to_cover(attempt.arch),
        "triton": triton.__version__,
        "failure": attempt.failure,
    }
    if attempt.failure:
        return row
    try:
        compiled = attempt.compiled
        assert compiled is not None  # there was no failure
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        row |= asdict(figures(compiled, GPUS[attempt.arch]))
        ahead, found = pipelines(compiled.asm["ttgir"]), summarise_sass(sass(compiled.asm["cubin"]))
        row |= loop_stats.loop_stats(ahead, found, row["programs_per_sm"])
        if mix:
            row["mix"], row["loop"], row["loops"] = found.mix, found.loop, found.loops
            row["pipelines"] = [asdict(pipeline) for pipeline in ahead]
            row["look_at"] = "; ".join([*loop_stats.remarks(ahead, found), found.look_at])
    except Exception as error:  # one kernel must not hide the others
        row["failure"] = one_line(error)
    return row


def _worse(one: Row, other: Row) -> Row:
    """Two rows of the same key as one with the worst of their figures."""
    if one["failure"] or other["failure"]:
        return one if one["failure"] else other
    found = {name: [r[name] for r in (one, other) if r[name] is not None] for name in WORST}
    loops = {name: loop_stats.worse(name, one[name], other[name]) for name in loop_stats.WORST}
    return one | {name: WORST[name](values) for name, values in found.items() if values} | loops
