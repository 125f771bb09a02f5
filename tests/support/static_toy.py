"""Toy ops for the static analysis, and a script that runs `python -m profiles` with them alone.

profiles/static/test_static.py runs it in a separate process, because pytest's process interprets
Triton.
"""

import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from bench.suite import OPS
from bench.suite.op import Case
from kernels.runtime.configs import Gpu, KernelConfig, Tunable
from kernels.runtime.dispatch import pick
from tests.bench.toy_op import toy_op


@triton.jit
def copy_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def product_kernel(a, b, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)).to(out.dtype.element_ty))


# If the loop loads the page number of the current block, that load is pipelined too, and takes a
# stage.
RELOADED = tl.constexpr("--reload" in sys.argv)


@triton.jit
def paged_kernel(q, kv, pages, out, blocks, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    rows = tl.load(q + at)
    acc = tl.zeros([SIZE, SIZE], tl.float32)
    page = tl.load(pages)
    for block in range(blocks):
        following = tl.load(pages + tl.minimum(block + 1, blocks - 1))
        page = tl.load(pages + block) if RELOADED else page
        k = tl.load(kv + page * SIZE * SIZE + at)
        v = tl.load(kv + (page + blocks) * SIZE * SIZE + at)
        weights = tl.exp2(tl.dot(rows, tl.trans(k)))
        acc = tl.dot(weights.to(v.dtype), v, acc)
        page = following
    tl.store(out + at, acc.to(out.dtype.element_ty))


def copy(x: Tensor, *, impl: str | None = None) -> Tensor:
    return pick("copy", impl, x.device, {"eager": Tensor.clone, "triton": _copy_triton})(x)


def product(a: Tensor, *, impl: str | None = None) -> Tensor:
    return pick("product", impl, a.device, {"eager": torch.matmul, "triton": _product})(a)


def paged(q: Tensor, *, impl: str | None = None) -> Tensor:
    return pick("paged", impl, q.device, {"eager": Tensor.clone, "triton": _paged})(q)


def plain(x: Tensor, *, impl: str | None = None) -> Tensor:
    return pick("plain", impl, x.device, {"eager": Tensor.clone})(x)


def _copy_candidates(key: str, gpu: Gpu) -> list[KernelConfig]:
    wrong = [{"block": 1000}] if "--wrong" in sys.argv else []
    return [{"block": 4096}, {"block": 8192, "num_warps": 1}, *wrong]


COPY = Tunable("copy", lambda gpu: {"block": 1024, "num_warps": 4}, _copy_candidates)
PRODUCT = Tunable("product", lambda gpu: {"size": 64 if gpu.arch == 90 else 32})


def _copy_triton(x: Tensor) -> Tensor:
    config = COPY.choose("any", x.device)
    out = torch.empty_like(x)
    copy_kernel[(1,)](x, out, x.numel(), BLOCK=config["block"], num_warps=config["num_warps"])
    return out


def _product(a: Tensor) -> Tensor:
    out = torch.empty_like(a)
    config = PRODUCT.choose("any", a.device)
    product_kernel[(1,)](a, a, out, SIZE=config["size"])
    return out


def _paged(q: Tensor) -> Tensor:
    out, pages = torch.empty_like(q), torch.empty(4, dtype=torch.int32)
    paged_kernel[(1,)](q, q, pages, out, 4, SIZE=64, num_warps=4, num_stages=3)
    return out


def _case(op: str, name: str, values: int, offset: int = 0) -> Case:
    def inputs(seed: int, device: torch.device, dtype: torch.dtype) -> dict:
        name = {"product": "a", "paged": "q"}.get(op, "x")
        return {name: torch.empty(values, dtype=dtype)[offset:]}

    return Case(op, name, inputs, values=values, flops=0)


if __name__ == "__main__":
    OPS.clear()
    runs = {"copy": copy, "product": product, "paged": paged, "plain": plain}
    OPS.update((name, toy_op(name, run)) for name, run in runs.items())
    from profiles import __main__
    from profiles.static import analysis as static

    narrow = 1 if "--narrow" in sys.argv else 0
    static.CASES[:] = [
        _case("copy", "4096", 4096 + narrow, narrow),
        _case("product", "64 x 64", 4096),
        _case("paged", "64 x 64", 4096),
        _case("plain", "no kernel", 64),
    ]
    faults = ("--wrong", "--narrow", "--reload")
    sys.exit(__main__.main([word for word in sys.argv[1:] if word not in faults]))
