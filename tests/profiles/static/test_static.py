"""Static analysis of compiled kernels, on any machine: figures, rules, baseline.

Compilation runs in separate processes, because Triton interprets in pytest's.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels.compile.launches import compiler, launches_recorded
from kernels.errors import ImplError
from kernels.runtime import dispatch
from kernels.runtime.configs import A100, H200, gpu_of
from kernels.runtime.dispatch import pick
from profiles.static import analysis as static
from profiles.static import loop_stats
from profiles.static.analysis import broken_rules, update
from profiles.static.sass import count_mix, load_bytes, min_load_bytes, programs_per_sm, wide_loads
from tests.support import ROOT


def run(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """`python -m module arguments`, compiling unless the environment says otherwise."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=env | environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> tuple[Path, list[dict]]:
    """A baseline of the toy ops, and its rows."""
    path = tmp_path_factory.mktemp("static") / "baseline.jsonl"
    done = run(
        "tests.support.static_toy",
        "static",
        "--update",
        "--sass",
        "--json",
        "--baseline",
        str(path),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return path, json.loads(done.stdout)["rows"]


@pytest.mark.cli
def test_a_row_for_each_kernel_and_config(toy):
    """Guards the sweep: every architecture and dtype, candidates in bf16 only, no ops without a
    Triton form, and the rule applied for each GPU."""
    found = [(row["kernel"], row["arch"], row["dtype"], row["config"]) for row in toy[1]]
    copies = [
        ("copy_kernel", arch, dtype, f"BLOCK={block} num_warps={warps} num_stages=3")
        for arch in (80, 90)
        for block, warps, dtypes in (
            (1024, 4, ("bfloat16", "float16")),
            (4096, 4, ("bfloat16",)),
            (8192, 1, ("bfloat16",)),
        )
        for dtype in dtypes
    ]
    products = [
        ("product_kernel", arch, dtype, f"SIZE={size} num_warps=4 num_stages=3")
        for arch, size in ((80, 32), (90, 64))
        for dtype in ("bfloat16", "float16")
    ]
    paged = [
        ("paged_kernel", arch, dtype, "SIZE=64 num_warps=4 num_stages=3")
        for arch in (80, 90)
        for dtype in ("bfloat16", "float16")
    ]
    assert sorted(found) == sorted(copies + products + paged)


@pytest.mark.cli
def test_figures_of_compiled_kernels(toy):
    """Guards the parsing of cubin, PTX and metadata: figures that follow from the kernels' code."""
    rows = {(row["kernel"], row["arch"], row["config"].split()[0]): row for row in toy[1]}
    copy = rows[
        "copy_kernel", 90, "BLOCK=8192"
    ]  # one warp holds 256 values: 128 registers and more
    assert 128 < copy["registers"] <= 255
    assert (copy["spill_bytes"], copy["shared_bytes"]) == (0, 0)
    assert (copy["min_load_bytes"], copy["wide_loads"]) == (16, 1.0)
    assert copy["mix"]["load 16"] == copy["mix"]["store"] == 8192 * 2 // 16 // 32
    product = rows["product_kernel", 90, "SIZE=64"]
    assert product["wgmma"] and product["mix"]["wgmma"] == 4  # k of 64 in steps of 16
    assert product["shared_bytes"] == 2 * 64 * 64 * 2
    ampere = rows["product_kernel", 80, "SIZE=32"]
    assert not ampere["wgmma"] and ampere["mix"]["mma"] > 0
    assert not any(row["tma"] for row in toy[1])


@pytest.mark.cli
def test_worse_kernels_break_rules(toy):
    """Guards the whole comparison: a misaligned input halves only loads, and a candidate that does
    not compile is reported with its reason."""
    arguments = ("static", "--quick", "--json", "--baseline", str(toy[0]))
    done = run("tests.support.static_toy", *arguments, "--narrow", "--op", "copy", "--arch", "90")
    assert done.returncode == 1
    name = "copy_kernel, sm_90, bfloat16, BLOCK=1024 num_warps=4 num_stages=3"
    assert json.loads(done.stdout)["broken_rules"] == [
        f"{name}: min_load_bytes 16 -> 2",
        f"{name}: wide_loads 1.0 -> 0.0",
    ]
    done = run(
        "tests.support.static_toy", "static", "--wrong", "--op", "copy", "--baseline", str(toy[0])
    )
    assert done.returncode == 1
    assert (
        "BLOCK=1000 num_warps=4 num_stages=3: CompilationError: arange's range must be a power of 2"
        in done.stdout
    )


@pytest.mark.cli
def test_a_page_load_in_the_loop_breaks_rules(toy):
    """Guards against a loss that this repository had: a page number that is loaded in the iteration
    that uses it takes a stage of the pipeline, and nothing overlaps. Carrying it avoids that."""
    paged = next(row for row in toy[1] if row["kernel"] == "paged_kernel" and row["arch"] == 90)
    assert (paged["buffers"], paged["async_wait"]) == ([3], [2])
    block, programs = 2 * 64 * 64 * 2, paged["programs_per_sm"]
    assert paged["bytes_in_flight"] == [block * programs]
    arguments = ("static", "--quick", "--sass", "--json", "--baseline", str(toy[0]))
    done = run("tests.support.static_toy", *arguments, "--reload", "--op", "paged", "--arch", "90")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    name = "paged_kernel, sm_90, bfloat16, SIZE=64 num_warps=4 num_stages=3"
    assert f"{name}: async_wait 2 -> 0" in found["broken_rules"]
    assert f"{name}: buffers 3 -> 2" in found["broken_rules"]
    assert "a scalar takes a stage of the pipeline in loop 1" in found["rows"][0]["look_at"]


@pytest.mark.cli
def test_the_table_and_the_loops(toy):
    """Guards the text output: figures loop by loop, and the bytes that an SM needs in flight."""
    done = run(
        "tests.support.static_toy", "static", "--sass", "--op", "paged", "--baseline", str(toy[0])
    )
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(line for line in done.stdout.splitlines() if " 90  bfloat16  SIZE=64" in line)
    assert line.split()[-5:-1] == ["3", "2", "66", "2"]
    assert "an SM of an h100 needs 18 to 25 KB in flight" in done.stdout
    assert "buffers 3 3, async_wait 2, 16,384 B x 4 programs per SM" in done.stdout


@pytest.mark.cli
def test_refuses_to_compile_where_triton_interprets():
    """Guards the message: in such a process no kernel can be compiled."""
    done = run("profiles", "static", TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: TRITON_INTERPRET is set") and done.stderr.count("\n") == 1


GOOD = {
    "op": "copy",
    "kernel": "copy_kernel",
    "arch": 90,
    "dtype": "bfloat16",
    "config": "BLOCK=1024",
    "registers": 64,
    "spill_bytes": 0,
    "shared_bytes": 1024,
    "programs_per_sm": 8,
    "wgmma": True,
    "tma": True,
    "min_load_bytes": 16,
    "wide_loads": 0.95,
    "buffers": [3, 2],
    "async_wait": [2, 2],
    "bytes_in_flight": [65536, 65536],
    "barriers": [2, 9],
    "instructions_per_block": [600, 360],
    "f2f": [0, 0],
    "narrow_shared_loads": [0, 0],
    "wgmma_waits": [1, 0],
    "triton": triton.__version__,
    "failure": None,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"registers": 80}, None),
        ({"wide_loads": 0.9}, None),
        ({"spill_bytes": 8}, "spill_bytes 0 -> 8"),
        ({"wgmma": False}, "wgmma True -> False"),
        ({"tma": False}, "tma True -> False"),
        ({"min_load_bytes": 8}, "min_load_bytes 16 -> 8"),
        ({"min_load_bytes": None}, "min_load_bytes 16 -> None"),
        ({"wide_loads": 0.8}, "wide_loads 0.95 -> 0.8"),
        ({"programs_per_sm": 7}, "programs_per_sm 8 -> 7"),
        ({"async_wait": [2, 0]}, "async_wait 2, 2 -> 2, 0"),
        ({"barriers": [3, 9]}, "barriers 2, 9 -> 3, 9"),
        ({"shared_bytes": 232449}, "232449 bytes of shared memory; the GPU has 232448"),
        ({"failure": "ValueError: no"}, "ValueError: no"),
        ({"config": "BLOCK=1"}, "not in the baseline; --update adds it"),
    ],
)
def test_each_rule(change, message):
    """Guards each rule separately: a broken one is named, with before and after; others pass."""
    row = GOOD | change
    name = f"copy_kernel, sm_90, bfloat16, {row['config']}"
    assert broken_rules([row], [GOOD]) == ([f"{name}: {message}"] if message else [])


def test_rules_with_another_triton():
    """Guards runs with another compiler: it may schedule differently and spill, but must not lose
    wgmma or tma, or produce kernels that do not fit."""
    old = GOOD | {"triton": "0.1"}
    moved = GOOD | {"programs_per_sm": 1, "min_load_bytes": 4, "wide_loads": 0.0, "spill_bytes": 4}
    moved["buffers"], moved["barriers"] = [0, 0], [20, 20]
    assert broken_rules([moved], [old]) == []
    assert len(broken_rules([moved | {"tma": False, "wgmma": False}], [old])) == 2
    new = moved | {"config": "new"}
    assert broken_rules([new], [old]) == []
    assert len(broken_rules([new | {"programs_per_sm": 0}], [old])) == 1
    assert len(broken_rules([new], [GOOD])) == 2  # the same compiler: it spills, and is not known


def test_a_row_holds_the_worst_of_its_launches():
    """Guards launches that share a row: each figure, and each loop's, is the worse one."""
    other = GOOD | {"registers": 80, "min_load_bytes": None, "async_wait": [4, 0]}
    worst = static._worse(GOOD, other)
    assert worst == GOOD | {"registers": 80, "async_wait": [2, 0]}
    failed = GOOD | {"failure": "ValueError: no"}
    assert static._worse(GOOD, failed) == static._worse(failed, GOOD) == failed


def test_figures_that_the_baseline_lacks_are_not_compared():
    """Guards baselines that are older than a figure: no comparison, no error."""
    older = {name: value for name, value in GOOD.items() if name not in loop_stats.WORST}
    assert broken_rules([GOOD | {"async_wait": [0, 0]}], [older]) == []
    (written,) = update([older], [GOOD], [], [90])
    assert written["async_wait"] == [2, 2] and written["wgmma_waits"] == [1, 0]


def test_update_replaces_what_was_compiled():
    """Guards --op and --arch with --update: rows of other ops and architectures stay, rows of
    launches that no longer exist are removed, failures are not written."""
    other, older = GOOD | {"op": "product"}, GOOD | {"arch": 80}
    gone, new, failed = (GOOD | {"config": text} for text in ("gone", "new", "failed"))
    failed["failure"] = "ValueError: no"
    updated = update([other, older, gone], [new, failed], ["copy"], [90])
    assert [(row["op"], row["arch"], row["config"]) for row in updated] == [
        ("copy", 80, "BLOCK=1024"),
        ("copy", 90, "new"),
        ("product", 90, "BLOCK=1024"),
    ]
    assert update([other, gone], [new], [], [80, 90]) == update([], [new], [], [80, 90])


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "gpu", "programs"),
    [
        (16, 0, 1, A100, 32),  # the SM's most programs
        (16, 0, 4, A100, 16),  # 64 warps
        (32, 0, 4, H200, 16),
        (33, 0, 4, H200, 12),  # registers are allocated per warp in units of 256
        (128, 0, 4, A100, 4),
        (80, 0, 1, A100, 24),  # six warps to a partition, not 25 to the SM
        (168, 0, 4, A100, 3),
        (169, 0, 4, A100, 2),
        (255, 0, 8, A100, 1),  # two warps to a partition
        (255, 0, 16, A100, 0),
        (32, 100 * 1024, 4, A100, 1),  # of 164 KiB
        (32, 100 * 1024, 4, H200, 2),  # of 228 KiB
        (32, 113 * 1024, 4, H200, 2),  # with the system's 1 KiB each, exactly
        (32, 113 * 1024 + 1, 4, H200, 1),
        (32, H200.shared_bytes, 4, H200, 1),
        (32, H200.shared_bytes + 1, 4, H200, 0),
    ],
)
def test_programs_per_sm(registers, shared, warps, gpu, programs):
    """Guards the occupancy against NVIDIA's calculator, and at exact fits."""
    assert programs_per_sm(registers, shared, warps, gpu) == programs


PTX = """
    ld.param.b64 %rd1, [copy_kernel_param_0];
    ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    @%p1 ld.global.L1::evict_last.L2::cache_hint.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ], %rd9;
    ld.global.b16 { %rs1 }, [ %rd1 + 0 ];
    ld.global.nc.b32 { %r1 }, [ %rd1 + 0 ];
    ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r9 ];
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r5;
    cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x8, 0x8;
    cp.async.commit_group;
    st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };
"""
TTGIR = """
    %0 = tt.load %k : tensor<64x128x!tt.ptr<bf16>, #blocked> loc(#loc1)
    %1 = tt.load %page, %mask : !tt.ptr<i32> loc(#loc2)
"""


def test_load_bytes():
    """Guards the patterns: global loads and asynchronous copies by width, without the scalar."""
    assert load_bytes(PTX, "") == {2: 2, 4: 4, 8: 16, 16: 32}
    assert load_bytes(PTX, TTGIR) == {2: 2, 8: 16, 16: 32}


@pytest.mark.parametrize(
    ("loads", "narrowest", "wide"),
    [
        ({}, None, None),
        ({16: 64}, 16, 1.0),
        ({4: 4, 16: 96}, 16, 0.96),  # 4 %
        ({2: 4, 4: 8, 16: 96}, 4, 0.89),  # 3.7 and 11.1 %
        ({2: 32, 16: 64}, 2, 0.67),  # one tensor of three fell apart
    ],
)
def test_narrowest_and_wide_loads(loads, narrowest, wide):
    """Guards the two figures of load width: a few narrow loads pass, a narrow tensor does not."""
    assert (min_load_bytes(loads), wide_loads(loads)) == (narrowest, wide)


def test_count_mix():
    """Guards the classes of instructions: similar names must not get each other's class."""
    names = (
        "LDG.E.128 LDG.E LDG.E.U16 LDG.E.64.CONSTANT LDGSTS.E.BYPASS.LTC128B.64 LDGSTS.E LDGDEPBAR"
    )
    names += (
        " LDS.128 STS LDSM.16.M88.4 STL LDL.64 HGMMA.64 HMMA.16816.F32 BAR.SYNC BARX UTMALDG.2D"
        " LDS.U8 LDS.S16 F2F.BF16.F16 F2FP.BF16.F32.PACK_AB DEPBAR.LE WARPGROUP.DEPBAR.LE"
    )
    assert count_mix(names.split()) == {
        "wgmma": 1,
        "mma": 1,
        "TMA load": 1,
        "load 16": 1,
        "load 8": 1,
        "load 4": 1,
        "load 1, 2": 1,
        "copy 8": 1,
        "copy 4": 1,
        "shared load 1, 2": 2,
        "shared load": 2,
        "shared store": 1,
        "spill": 2,
        "barrier": 1,
        "F2F": 1,
        "copy wait": 1,
        "other": 4,
    }


def test_recording_is_confined(monkeypatch):
    """Guards later code: Triton and the ops must be restored, also after an error."""
    monkeypatch.setattr(dispatch, "_interpreting", lambda: False)
    forms = {"eager": lambda: "eager", "triton": lambda: "triton"}
    cpu, run, active = torch.device("cpu"), JITFunction.run, driver._active
    with pytest.raises(ZeroDivisionError), launches_recorded(A100) as launches, compiler(A100):
        assert pick("op", "triton", cpu, forms)() == "triton"
        assert gpu_of(cpu) == A100 and driver.active.get_current_target().arch == 80
        assert JITFunction.run is not run and launches == []
        raise ZeroDivisionError
    assert JITFunction.run is run and driver._active is active and gpu_of(cpu) == H200
    with pytest.raises(ImplError, match="needs a CUDA device"):
        pick("op", "triton", cpu, forms)
