"""Ops on caches of up to 512 GiB, of which only a few pages exist: page ids whose offsets exceed
int32, in elements, bytes, tokens and rows of a flattened view.

The same op with the same values in the first pages of a small cache is the judge, bit by bit.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench.inputs.trees import Node, fork
from bench.suite.prefix_attention import inputs as prefix_attention_inputs
from bench.suite.rotary_attention import inputs as rotary_attention_inputs
from kernels.kv_pages import KVPages
from kernels.prefix_attention import prefix_attention
from kernels.prefix_attention.advance import advance
from kernels.prefix_plan import PrefixPlan
from kernels.qk_norm_rope import qk_norm_rope
from kernels.rotary_attention import rotary_attention
from kernels.runtime.configs import Gpu, assume_gpu, use_config
from tests.kernels.limits.reserved import reserved
from tests.support.prefix_trees import SWITCHES

PAGE, KV_HEADS, DIM = 16, 2, 16
SHAPE = {"heads": 2, "kv_heads": KV_HEADS, "head_dim": DIM, "page_size": PAGE}
FIRST_PAGES = {
    "2^31 elements": 2**31 // (PAGE * KV_HEADS * DIM),  # wraps to before the tensor
    "2^32 rows": 2**32 // (PAGE * KV_HEADS),  # 2^31 tokens; wraps to its first page
}
FOREST = [fork(17, [1, 16])]


@pytest.fixture(params=FIRST_PAGES.values(), ids=FIRST_PAGES.keys())
def first(request, triton_device) -> int:
    """The first page that is used."""
    if triton_device == "cuda" and request.param == FIRST_PAGES["2^32 rows"]:
        pytest.skip("a GPU has no memory that is only reserved")
    return request.param


@pytest.fixture(autouse=True)
def toy():
    """Few CTAs, because they run one after the other in the interpreter."""
    gpu = Gpu("toy", arch=90, sms=2, shared_bytes=227 * 1024)
    with assume_gpu(gpu), use_config("prefix_attention", programs=1, grain=16, overhead=1):
        yield


def moved(inputs: dict, first: int) -> dict:
    """The inputs with page `first + i` in the place of page i."""
    plan = inputs["plan"]

    def move(x: Tensor) -> Tensor:
        shape = (first + len(x), *x.shape[1:])
        large = x.new_empty(shape) if x.is_cuda else reserved(shape, x.dtype)
        large[first:] = x
        return large

    pages = inputs["pages"].map(move)
    nodes = [replace(node, pages=[first + page for page in node.pages]) for node in plan.nodes]
    sizes = {"num_rows": plan.num_rows, "num_pages": pages.num_pages, "page_size": PAGE}
    result = inputs | {
        "pages": pages,
        "plan": PrefixPlan.build(nodes, **sizes, device=plan.kv_len.device),
    }
    if "slots" in inputs:
        result["slots"] = inputs["slots"] + first * PAGE
    return result


def assert_same(one: Tensor, other: Tensor) -> None:
    """Bitwise, NaN included."""
    assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def assert_same_pages(large: KVPages, small: KVPages) -> None:
    for x, y in zip(large, small, strict=True):
        if x is not None and y is not None:
            assert_same(x[-len(y) :], y)


def decode_step(device: str, fp8: bool) -> dict:
    return rotary_attention_inputs(0, device, torch.float32, forest=FOREST, fp8=fp8, **SHAPE)


@pytest.mark.parametrize("fp8", [False, True], ids=["fp32", "fp8"])
@pytest.mark.parametrize("impl", ["eager", "portable", "triton"])
def test_store(triton_device, first, impl, fp8):
    """Guards where qk_norm_rope writes K, V and their scales."""
    small = decode_step(triton_device, fp8)
    large = moved(small, first)
    names = ("qkv", "q_weight", "k_weight", "frequencies", "positions", "slots", "pages")
    for inputs in (small, large):
        qk_norm_rope(**{name: inputs[name] for name in names}, impl=impl)
    assert not small["pages"].k.view(torch.uint8)[:, :, :, 0].isnan().any()
    assert_same_pages(large["pages"], small["pages"])


@pytest.mark.parametrize(
    ("form", "fp8"),
    [
        ("eager", True),
        ("portable", False),
        ("portable", True),
        ("triton, line", False),
        ("triton, pieces", True),
    ],
)
def test_attention(triton_device, first, form, fp8):
    """Guards the pages and scales that attention reads, in decode and in a prefill."""
    impl, _, walk = form.partition(", ")
    forest = [*FOREST, Node(18, new=2)]
    small = prefix_attention_inputs(
        0, triton_device, torch.float32, forest=forest, return_lse=True, fp8=fp8, **SHAPE
    )
    switches = dict.fromkeys(SWITCHES, int(walk == "pieces")) | {"pdl": 0}
    with use_config("prefix_attention", **switches):
        results = [prefix_attention(**x, impl=impl) for x in (moved(small, first), small)]
    for large, expected in zip(*results, strict=True):
        assert_same(large, expected)


def test_fused_decode(triton_device, first):
    """Guards fused decode, which reads pages and writes the new token with its scales."""
    small = decode_step(triton_device, fp8=True)
    large = moved(small, first)
    results = [rotary_attention(**x, fused=True, impl="triton") for x in (large, small)]
    assert_same(*results)
    assert_same_pages(large["pages"], small["pages"])


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_advance(triton_device, first, impl):
    """Guards the next slots, which the page table gives: beyond 2^31 tokens they exceed int32."""
    plan = decode_step("cpu", False)["plan"]
    leaves = [node for node in plan.nodes if node.num_new]
    extra = [plan.num_pages + row for row in range(plan.num_rows)]  # a page more for each leaf
    nodes = [
        replace(
            node,
            pages=[first + page for page in (*node.pages, *extra[node.row_start : node.row_end])],
        )
        for node in leaves
    ]
    sizes = {"num_rows": len(nodes), "num_pages": first + plan.num_pages + len(extra)}
    large = PrefixPlan.build(nodes, **sizes, page_size=PAGE, device=triton_device)
    positions = large.row_position.long()
    slots = torch.zeros(len(nodes), dtype=torch.int64, device=triton_device)
    advance(large, positions, slots, impl=impl)
    expected = [n.pages[n.kv_len // PAGE] * PAGE + n.kv_len % PAGE for n in nodes]
    assert slots.tolist() == expected
    if max(expected) >= 2**31:
        with pytest.raises(ValueError, match="slots of .* must be int64"):
            advance(large, positions, slots.int(), impl=impl)


def test_tma_needs_rows_in_int32(triton_device):
    """Guards TMA, whose rows are int32: a cache with more of them is refused, not misread."""
    small = prefix_attention_inputs(0, "cpu", torch.float32, forest=FOREST, **SHAPE)
    large = moved(small, FIRST_PAGES["2^32 rows"] // 2 - small["plan"].num_pages)
    with use_config("prefix_attention", tma=1):
        prefix_attention(**large, impl="triton")
        more = moved(small, FIRST_PAGES["2^32 rows"] // 2)
        with pytest.raises(ValueError, match="tma takes pages of at most 2\\^31"):
            prefix_attention(**more, impl="triton")
