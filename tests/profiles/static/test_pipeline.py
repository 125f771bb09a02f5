"""Pipelines read from TTGIR (as Triton 3.6.0 prints it, shortened), and figures by loop."""

import pytest

from profiles.static import loop_stats
from profiles.static.loop_stats import bytes_to_cover, remarks, worse, worsened
from profiles.static.pipeline import Pipeline, pipelines
from profiles.static.sass_loop import SassSummary

# Two successive loops in a persistent one; both use the name %12. K and V are 16 KiB.
ATTENTION = """
    %tile:2 = scf.while (%place = %first, %at = %0) : (i32, i32) -> (i32, i32) {
      scf.condition(%1) %place, %at : i32, i32
    } do {
      %start = tt.load %start_at : !tt.ptr<i32>
      scf.if %2 {
        %12 = ttg.local_alloc : () -> !ttg.memdesc<3x64x128xbf16, #shared, #smem, mutable>
        %v = ttg.local_alloc : () -> !ttg.memdesc<4x64x128xbf16, #shared, #smem, mutable>
        %k0 = ttg.memdesc_index %12[%c0_i32] : !ttg.memdesc<3x64x128xbf16, #shared, #smem, mutable> -> !ttg.memdesc<64x128xbf16, #shared, #smem, mutable>
        %13 = ttg.async_copy_global_to_local %source, %k0 mask %3 other %cst {contiguity = 8 : i32} : tensor<64x128x!tt.ptr<bf16>, #blocked> -> <64x128xbf16, #shared, #smem, mutable>
        %14 = ttg.async_commit_group tokens %13
        %acc:2 = scf.for %i = %low to %high step %c1_i32 iter_args(%token = %14) -> (tensor<64x128xf32, #mma>, !ttg.async.token)  : i32 {
          %15 = ttg.async_wait %token {num = 2 : i32}
          %16 = ttng.warp_group_dot %q, %17, %cst_0 {inputPrecision = 0 : i32, isAsync = true} : !ttg.memdesc<64x128xbf16, #shared, #smem> * !ttg.memdesc<128x64xbf16, #shared2, #smem, mutable> -> tensor<64x64xf32, #mma>
          %following = tt.load %page_at : !tt.ptr<i32>
          %18 = ttg.memdesc_index %12[%buffer] : !ttg.memdesc<3x64x128xbf16, #shared, #smem, mutable> -> !ttg.memdesc<64x128xbf16, #shared, #smem, mutable>
          %19 = ttg.async_copy_global_to_local %20, %18 mask %4 other %cst {contiguity = 8 : i32} : tensor<64x128x!tt.ptr<bf16>, #blocked> -> <64x128xbf16, #shared, #smem, mutable>
          %21 = ttg.async_commit_group tokens %19
          %22 = ttg.memdesc_index %v[%buffer] : !ttg.memdesc<4x64x128xbf16, #shared, #smem, mutable> -> !ttg.memdesc<64x128xbf16, #shared, #smem, mutable>
          %23 = ttg.async_copy_global_to_local %24, %22 mask %4 other %cst {contiguity = 8 : i32} : tensor<64x128x!tt.ptr<bf16>, #blocked> -> <64x128xbf16, #shared, #smem, mutable>
          %25 = ttg.async_commit_group tokens %23
          scf.yield %16, %25 : tensor<64x128xf32, #mma>, !ttg.async.token
        } loc(#loc7)
        %26 = ttg.async_wait {num = 0 : i32}
      } loc(#loc8)
      scf.if %5 {
        %11 = ttg.local_alloc : () -> !ttg.memdesc<1x1xi32, #shared1, #smem, mutable>
        %12 = ttg.local_alloc : () -> !ttg.memdesc<1x64x128xi8, #shared3, #smem, mutable>
        %page = ttg.memdesc_index %11[%c0_i32] : !ttg.memdesc<1x1xi32, #shared1, #smem, mutable> -> !ttg.memdesc<1xi32, #shared1, #smem, mutable>
        %k0 = ttg.memdesc_index %12[%c0_i32] : !ttg.memdesc<1x64x128xi8, #shared3, #smem, mutable> -> !ttg.memdesc<64x128xi8, #shared3, #smem, mutable>
        %acc = scf.for %i = %low to %high step %c1_i32 iter_args(%token = %14) -> (tensor<16x128xf32, #mma1>)  : i32 {
          %15 = ttg.async_wait %token {num = 0 : i32}
          %16 = tt.dot %q, %17, %cst_1, inputPrecision = tf32 : tensor<16x128xbf16, #dot0> * tensor<128x64xbf16, #dot1> -> tensor<16x64xf32, #mma1>
          %18 = ttg.async_copy_global_to_local %19, %k0 mask %6 : tensor<64x128x!tt.ptr<i8>, #blocked> -> <64x128xi8, #shared3, #smem, mutable>
          %20 = ttg.async_commit_group tokens %18
          %21 = ttg.async_copy_global_to_local %22, %page mask %6 : tensor<1x!tt.ptr<i32>, #blocked2> -> <1xi32, #shared1, #smem, mutable>
          %23 = ttg.async_commit_group tokens %21
          scf.yield %16 : tensor<16x128xf32, #mma1>
        }
      }
      scf.yield %7, %8 : i32, i32
    }
"""  # noqa: E501
BLOCK = 64 * 128 * 2
CARRIED = Pipeline((3, 4), 2, 2 * BLOCK, scalar_copies=0, scalar_loads=1)
RELOADED = Pipeline((1,), 0, 0, scalar_copies=1, scalar_loads=0)


def test_loops_with_products():
    """Guards the choice of loops (not the persistent one) and the parsing of each: buffers through
    an index in the loop or before it, the nearest of two equal names, separate scalars."""
    assert pipelines(ATTENTION) == [CARRIED, RELOADED]


def test_pending_groups():
    """Guards the bytes in flight: the newest groups of the previous iteration, of any size."""
    assert pipelines(ATTENTION.replace("num = 2", "num = 3"))[0].bytes_ahead == 3 * BLOCK
    second = ATTENTION.replace("%token {num = 0", "%token {num = 1")
    assert pipelines(second)[1].bytes_ahead == 4  # the page number
    assert pipelines(second.replace("num = 1", "num = 2"))[1].bytes_ahead == BLOCK // 2 + 4
    page = second.index("          %21 = ttg.async_copy")
    wait = "          %15 = ttg.async_wait %token {num = 1 : i32}\n"
    between = second.replace(wait, "")
    page -= len(wait)
    between = between[:page] + wait + between[page:]
    assert pipelines(between)[1].bytes_ahead == BLOCK // 2  # K is newer than the last page number


def test_while_loops():
    """Guards the second region of a while loop, which is its body."""
    loop = "scf.while (%0 = %1) : (i32) -> (i32) {{\n  {}\n}} do {{\n  {}\n}} loc(#loc1)\n"
    text = loop.format(
        "scf.condition(%2) %0 : i32", f"%4 = tt.load %5 : !tt.ptr<i32>\n  %3 = {DOT}"
    )
    assert pipelines(text) == [Pipeline((), None, None, scalar_copies=0, scalar_loads=1)]


TENSOR_COPY = (
    "ttng.async_tma_copy_global_to_local %a[%0, %1] {}, %barrier, %true : !tt.tensordesc<"
    "tensor<128x64xbf16, #shared>>, !ttg.memdesc<1xi64, #shared1, #smem, mutable>"
    " -> !ttg.memdesc<128x64xbf16, #shared, #smem, mutable>"
)
DOT = "ttng.warp_group_dot %5, %6, %7 : tensor<128x256xf32, #mma>"
PRODUCT = f"""
    %a_tile = ttg.local_alloc : () -> !ttg.memdesc<4x128x64xbf16, #shared, #smem, mutable>
    %2 = ttg.memdesc_index %a_tile[%c0_i32] : !ttg.memdesc<4x128x64xbf16, #shared, #smem, mutable>
    {TENSOR_COPY.format("%2")}
    %3 = ttg.memdesc_index %a_tile[%c1_i32] : !ttg.memdesc<4x128x64xbf16, #shared, #smem, mutable>
    {TENSOR_COPY.format("%3")}
    %4 = scf.for %k = %c0_i32 to %steps step %c1_i32 iter_args(%8 = %9) -> (f32)  : i32 {{
      ttng.wait_barrier %10, %11 : !ttg.memdesc<1xi64, #shared1, #smem, mutable>
      %acc = {DOT}
      %12 = ttg.memdesc_index %a_tile[%k] : !ttg.memdesc<4x128x64xbf16, #shared, #smem, mutable>
      {TENSOR_COPY.format("%12")}
    }}
"""


def test_tensor_copies():
    """Guards copies that barriers await: those issued before the loop give the distance."""
    assert pipelines(PRODUCT) == [Pipeline((4,), None, 128 * 64 * 2, 0, 0)]


def test_unrecognised_code_gives_none():
    """Guards other forms of code: None, not an error, and not 0, which would count as a loss."""
    unknown = Pipeline(None, None, None, 0, 0)
    assert pipelines(PRODUCT.replace("ttg.local_alloc", "ttg.other_alloc")) == [unknown]
    assert pipelines(PRODUCT.replace("[%0, %1] %12", "[%0, %1] to %12")) == [unknown]
    loop = f"scf.for %k = %0 to %1 step %2 : i32 {{\n  %3 = {DOT}\n}}\n"
    assert pipelines(loop) == [Pipeline((), None, None, 0, 0)]  # nothing is copied
    assert pipelines("ttg.warp_specialize(%0)\n" + loop) == [unknown]  # another warp may copy
    assert pipelines("") == pipelines("scf.for without an end") == pipelines(DOT) == []


def test_the_loop_with_most_loads_if_none_has_products():
    """Guards memory-bound kernels: one loop, the one that loads most bytes."""
    loop = "scf.for %i = %0 to %1 step %2 : i32 {{\n  %3 = {}\n}}\n"
    narrow, wide = (f"tt.load %4 : tensor<{size}x!tt.ptr<f32>, #blocked>" for size in (64, 128))
    scalar = "tt.load %4, %5 : !tt.ptr<i32>"
    text = "".join(map(loop.format, (narrow, f"{wide}\n  %4 = {scalar}", narrow)))
    assert pipelines(text) == [Pipeline((), None, None, scalar_copies=0, scalar_loads=1)]


MIXES = [
    {"wgmma": 12, "barrier": 2, "wgmma wait": 1, "other": 500},
    {"mma": 32, "F2F": 128, "barrier": 9, "copy 4": 5, "shared load 1, 2": 64, "other": 300},
]


def test_figures_and_remarks():
    """Guards the lists: a figure for each loop; bytes in flight for all programs of an SM."""
    found = SassSummary(9000, {}, MIXES)
    assert loop_stats.loop_stats([CARRIED, RELOADED], found, 2) == {
        "buffers": [3, 1],
        "async_wait": [2, 0],
        "bytes_in_flight": [2 * 2 * BLOCK, 0],
        "barriers": [2, 9],
        "instructions_per_block": [515, 538],
        "f2f": [0, 128],
        "narrow_shared_loads": [0, 64],
        "wgmma_waits": [1, 0],
    }
    assert remarks([CARRIED, RELOADED], found) == [
        "scalar loads in loop 1",
        "copies awaited as soon as they are issued in loop 2",
        "a scalar takes a stage of the pipeline in loop 2",
        "copies of 4 bytes in loop 2",
    ]
    assert remarks([CARRIED, CARRIED], SassSummary(9, {}, [])) == ["scalar loads in loop 1, 2"]
    only_page = remarks([RELOADED], SassSummary(9, {}, [{"copy 4": 1}]))
    assert not any("4 bytes" in text for text in only_page)  # those of the scalar
    assert remarks([Pipeline((), None, None, 0, scalar_loads=1)], found) == []
    without = loop_stats.loop_stats([], SassSummary(9, {}, []), 2)
    assert set(without.values()) == {None}


def test_bytes_to_cover():
    """Guards Little's law against hand arithmetic: 132 SMs share 3.0 to 3.35 TB/s, 0.8 to 1 us."""
    assert bytes_to_cover(90)["h100"] == (18_273, 25_379)
    assert bytes_to_cover(90)["h200"] == (26_182, 36_364)


@pytest.mark.parametrize(
    ("name", "before", "now", "text"),
    [
        ("async_wait", [2, 2], [2, 0], "2, 2 -> 2, 0"),
        ("async_wait", [2, 2], [3, 2], None),
        ("async_wait", [None, 2], [0, 2], None),  # tensor copies before, asynchronous ones now
        ("async_wait", [2], [None], "2 -> None"),
        ("async_wait", [2], None, "2 -> none"),  # no loop is found any more
        ("buffers", [3, 2], [3, 1], "3, 2 -> 3, 1"),
        ("buffers", [3, 2], [3, 3, 2, 2], None),  # masked blocks got a separate loop
        ("buffers", [3, 2], [3, 3, 2, 1], "3, 2 -> 3, 3, 2, 1"),
        ("barriers", [2, 9], [9, 2], "2, 9 -> 9, 2"),
        ("barriers", [9], [2], None),
        ("barriers", [9], None, None),
        ("instructions_per_block", [600, 360], [630, 360], None),
        ("instructions_per_block", [600, 360], [631, 360], "600, 360 -> 631, 360"),
        ("f2f", [0], [1], "0 -> 1"),
        ("wgmma_waits", [1], [36], "1 -> 36"),
        ("bytes_in_flight", [9], [1], None),  # follows from the others and from programs_per_sm
        ("narrow_shared_loads", [0], [64], None),
    ],
)
def test_each_loop_is_compared(name, before, now, text):
    """Guards the comparison loop by loop, or of the worst loops if loops were added."""
    row = dict.fromkeys(loop_stats.WORST) | {name: now}
    assert list(worsened(row, {name: before})) == ([f"{name} {text}"] if text else [])
    assert list(worsened(row, {})) == []  # a baseline without the figure


def test_worse_of_two_launches():
    """Guards rows of several launches: the worse of each loop, ignoring missing loops and None."""
    assert worse("async_wait", [2, 4], [3, 0]) == [2, 0]
    assert worse("barriers", [2, 9], [4, None]) == [4, 9]
    assert worse("buffers", [None], [None, 3]) == [None, 3]
    assert worse("buffers", None, [2]) == worse("buffers", [2], None) == [2]
    assert worse("buffers", None, None) is None
