"""Compiles every Triton kernel that the ops launch, without a GPU, and checks it with a baseline.

The ops' launchers run on CPU tensors; their launches are recorded and compiled for each
architecture, with the kernel configs of the committed tables, those of the rules, and every
candidate that `python -m bench tune` would measure. A row has the worst figures over all launches
with the same kernel, architecture, dtype and config.

`broken_rules` defines what must hold of a row, alone and compared with the committed baseline.
"""

import ast
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from threading import Lock

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from bench.rows.formats import config_text
from bench.suite import compiled_cases, in_modes
from bench.suite.forms import form
from bench.suite.op import Case
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
from profiles.static.sass import kernel_stats, sass
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


CASES = compiled_cases()


@dataclass(frozen=True)
class CompiledLaunch:
    """One launch with one kernel config: its compiled kernel, or why there is none."""

    op: str
    arch: int
    kernel: str
    dtype: str
    config: str
    compiled: CompiledKernel | None = None  # or a future, with `result()`
    failure: str | None = None


def sweep(
    ops: Sequence[str], archs: Sequence[int], *, quick: bool = False, mix: bool = False
) -> list[Row]:
    """Rows of `ops` (all if empty) on `archs`, in the order of the cases.

    `quick` compiles only the configs of tables and rules in bf16, no candidates. `mix` adds counts
    of instructions by class (kernel and hot loops), each loop's pipeline, and what to look at.
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
        _parse_one_at_a_time(),
        ThreadPoolExecutor(os.cpu_count()) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        launches = dict.fromkeys(
            launch for site in track(sites, "recording") for launch in _all_configs(*site, quick)
        )
        for launch in track(launches, "compiling"):
            row = _row(launch, mix)
            key = key_of(row)
            rows[key] = _worse(rows[key], row) if key in rows else row
    return list(rows.values())


def key_of(row: Row) -> tuple:
    return tuple(row[name] for name in KEY)


def broken_rules(rows: Sequence[Row], baseline: Sequence[Row]) -> list[str]:
    """What is wrong with `rows`, one line per problem.

    Every row must compile, fit an SM and be in the baseline. Compared with the baseline, there must
    be no new spill, no loss of wgmma or tma, no narrower loads, no fewer programs per SM, and each
    hot loop must copy as far ahead with no more barriers, waits and instructions. Registers may
    change. If the baseline is from another Triton, which allocates registers differently, only
    wgmma and tma count.
    """
    before = {key_of(row): row for row in baseline}
    comparable = same_triton(baseline)
    wrong = []
    for row in rows:
        known = before.get(key_of(row))
        if row["failure"]:
            problems = [row["failure"]]
        elif known:
            problems = [*_unfit(row), *_worsened(row, known)]
        else:
            problems = list(_unfit(row))
            if comparable:
                problems += [f"{row['spill_bytes']} bytes spilled"] * bool(row["spill_bytes"])
                problems += ["not in the baseline; --update adds it"]
        name = f"{row['kernel']}, sm_{row['arch']}, {row['dtype']}, {row['config']}"
        wrong += [f"{name}: {text}" for text in problems]
    return wrong


def same_triton(baseline: Sequence[Row]) -> bool:
    """Whether any row of the baseline was compiled by the installed Triton."""
    return any(row["triton"] == triton.__version__ for row in baseline)


def update(
    baseline: Sequence[Row], rows: Sequence[Row], ops: Sequence[str], archs: Sequence[int]
) -> list[Row]:
    """The baseline, with `rows` instead of its rows of `ops` (all if empty) on `archs`."""
    kept = [row for row in baseline if (ops and row["op"] not in ops) or row["arch"] not in archs]
    good = [row for row in rows if not row["failure"]]
    names = (*KEY, *WORST, *loop_stats.WORST, "op", "triton")
    new = [{name: row[name] for name in names} for row in good]
    return sorted([*kept, *new], key=lambda row: (row["op"], *key_of(row)))


@contextmanager
def _parse_one_at_a_time() -> Iterator[None]:
    """Let only one thread at a time parse a kernel's source.

    With two, Python 3.11 may lose track of its recursion depth and raise SystemError
    (python/cpython#106905).
    """
    parse, lock = JITFunction.parse, Lock()

    def parse_locked(kernel: JITFunction) -> ast.Module:
        with lock:
            return parse(kernel)

    JITFunction.parse = parse_locked
    try:
        yield
    finally:
        JITFunction.parse = parse


def _unfit(row: Row) -> Iterator[str]:
    limit = GPUS[row["arch"]].shared_bytes
    if row["shared_bytes"] > limit:
        yield f"{row['shared_bytes']} bytes of shared memory; the GPU has {limit}"
    elif not row["programs_per_sm"]:
        yield f"no program fits an SM with {row['registers']} registers per thread"


def _worsened(row: Row, known: Row) -> Iterator[str]:
    """The figures of `row` that are worse than those of `known`, as "name before -> after"."""
    at_least = {"wgmma": known["wgmma"], "tma": known["tma"]}
    same = known["triton"] == row["triton"]
    if same:
        if row["spill_bytes"] > known["spill_bytes"]:
            yield f"spill_bytes {known['spill_bytes']} -> {row['spill_bytes']}"
        at_least |= {name: known[name] or 0 for name in ("min_load_bytes", "programs_per_sm")}
        at_least["wide_loads"] = (known["wide_loads"] or 0) - WIDE_LOADS_SLACK
    for name, minimum in at_least.items():
        if (row[name] or 0) < minimum:
            yield f"{name} {known[name]} -> {row[name]}"
    if same:
        yield from loop_stats.worsened(row, known)


def _all_configs(case: Case, dtype: torch.dtype, gpu: Gpu, quick: bool) -> Iterator[CompiledLaunch]:
    """The case's launches with every kernel config, submitted to the compiler."""
    with unfilled():
        arguments = case.inputs(0, torch.device("cpu"), dtype)
    with record_configs() as lookups:
        yield from _compile(case, gpu, arguments)
    # A GPU without a table gets the rule's config.
    yield from _compile(case, replace(gpu, name="none"), arguments)
    if quick or dtype != DTYPES[0]:
        return
    for part, key in lookups:
        for config in TUNABLES[part].candidates(key, gpu):
            with use_config(part, **config):
                yield from _compile(case, gpu, arguments, config)


def _compile(
    case: Case, gpu: Gpu, arguments: dict, config: KernelConfig | None = None
) -> list[CompiledLaunch]:
    try:
        with launches_recorded(gpu) as launches:
            form(case.op, case.form)(arguments)()
    except ImplError:  # no Triton form
        return []
    except Exception as error:  # one config must not hide the others
        text = f"{case.name} {config_text(config or {})}".strip()
        return [CompiledLaunch(case.op, gpu.arch, case.op, "", text, failure=one_line(error))]
    with compiler(gpu):
        return [
            CompiledLaunch(
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
    """The floating dtypes of a launch's tensors; fp32 or "int" only if there is no other."""
    tensors = [
        value for value in (*launch.args, *launch.kwargs.values()) if isinstance(value, Tensor)
    ]
    names = {dtype_name(tensor.dtype) for tensor in tensors}
    plain = {
        name for name in names if name == "float32" or not name.startswith(("float", "bfloat"))
    }
    return "+".join(sorted(names - plain)) or ("float32" if "float32" in names else "int")


def config_of(launch: Launch) -> str:
    """What a kernel is specialised for, such as "BLOCK=1024 -residual num_warps=8 num_stages=3":
    constexprs, absent pointers, options.
    """
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.kwargs
    parts = []
    for parameter in launch.kernel.params:
        value = values.pop(parameter.name, parameter.default)
        if value is None:
            parts.append(f"-{parameter.name}")
        elif hasattr(value, "_asdict"):  # a NamedTuple of arguments
            absent = [name for name, field in value._asdict().items() if field is None]
            parts += [f"-{parameter.name}.{name}" for name in absent]
        elif parameter.is_constexpr:
            value = getattr(value, "value", value)  # of a tl.constexpr
            value = int(value) if isinstance(value, bool) else str(value).replace(" ", "")
            parts.append(f"{parameter.name}={value}")
    values = {"num_warps": 4, "num_stages": 3} | values
    options = (f"{name}={value}" for name, value in values.items() if value is not None)
    return " ".join([*parts, *options])


def _row(launch: CompiledLaunch, mix: bool) -> Row:
    row = {
        "op": launch.op,
        "kernel": launch.kernel,
        "arch": launch.arch,
        "dtype": launch.dtype,
        "config": launch.config,
        **dict.fromkeys((*WORST, *loop_stats.WORST)),
        "bytes_to_cover": loop_stats.bytes_to_cover(launch.arch),
        "triton": triton.__version__,
        "failure": launch.failure,
    }
    if launch.failure:
        return row
    try:
        compiled = launch.compiled
        assert compiled is not None  # as there was no failure
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        row |= asdict(kernel_stats(compiled, GPUS[launch.arch]))
        loops = pipelines(compiled.asm["ttgir"])
        summary = summarise_sass(sass(compiled.asm["cubin"]))
        row |= loop_stats.loop_stats(loops, summary, row["programs_per_sm"])
        if mix:
            row["mix"], row["loop"], row["loops"] = summary.mix, summary.loop, summary.loops
            row["pipelines"] = [asdict(pipeline) for pipeline in loops]
            row["look_at"] = "; ".join([*loop_stats.remarks(loops, summary), summary.look_at])
    except Exception as error:  # one kernel must not hide the others
        row["failure"] = one_line(error)
    return row


def _worse(a: Row, b: Row) -> Row:
    """Two rows of the same key, merged: the worse of each figure."""
    if a["failure"] or b["failure"]:
        return a if a["failure"] else b
    both = {name: [row[name] for row in (a, b) if row[name] is not None] for name in WORST}
    loops = {name: loop_stats.worse(name, a[name], b[name]) for name in loop_stats.WORST}
    return a | {name: WORST[name](values) for name, values in both.items() if values} | loops
