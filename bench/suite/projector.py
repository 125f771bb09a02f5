"""The projector: two convolutions with stride 2 and a linear layer, folded."""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.errors import Error
from bench.fp64 import downsample, split_views
from bench.inputs.draws import Device, NormalDraws
from bench.inputs.presets import BIG, TINY, vision_of
from bench.inputs.views import crop, global_view, named, photo, projector_flops, views_of
from bench.peers.compile_peer import COMPILE, compiled
from bench.peers.peer import Peer
from bench.peers.projector_peer import CUDNN, cudnn
from bench.suite.op import Case, Op, Shape
from kernels.projector import fold, output_tokens, projector
from kernels.runtime.grids import Grid, tokens_of


def inputs(
    seed: int,
    device: Device,
    dtype: torch.dtype,
    *,
    grids: Sequence[Grid],
    width: int,
    out: int,
    scattered: bool = False,
) -> dict:
    """Channels double with each convolution, as in every preset. Weights are channels-last, as in
    the model, and also folded. With `scattered`, results go to random rows of a NaN output that has
    twice as many rows."""
    draw = NormalDraws(seed, device, dtype)

    def kernel(*shape: int) -> Tensor:
        weight = draw(*shape, scale=(9 * shape[1]) ** -0.5)
        return weight.contiguous(memory_format=torch.channels_last)

    arguments: dict = {
        "x": draw(tokens_of(grids), width),
        "grids": tuple(grids),
        "w1": kernel(2 * width, width, 3, 3),
        "b1": draw(2 * width, scale=0.1),
        "w2": kernel(4 * width, 2 * width, 3, 3),
        "b2": draw(4 * width, scale=0.1),
        "w3": draw(out, 4 * width, scale=(4 * width) ** -0.5),
    }
    arguments["folded"] = fold(arguments["w2"], arguments["b2"], arguments["w3"])
    if scattered:
        tokens = sum(map(output_tokens, grids))
        rows = torch.randperm(2 * tokens, generator=draw.host)[:tokens]
        arguments["out"] = torch.full((2 * tokens, out), math.nan, device=device, dtype=dtype)
        arguments["rows"] = rows.to(device)
    return arguments


def case(grids: Sequence[Grid], width: int, out: int, scattered: bool = False) -> Case:
    """The minimum work is that of the folded weights: w2 and w3 need not be read."""
    shape: Shape = {"width": width, "out": out, "scattered": scattered}
    weights = 18 * width**2 + 18 * width * out
    end = sum(map(output_tokens, grids))
    return Case(
        op="projector",
        name=f"{named(grids)} C{width}" + (" scattered" if scattered else ""),
        inputs=partial(inputs, grids=tuple(grids), **shape),
        values=tokens_of(grids) * width + weights + 2 * width + out + end * out,
        flops=projector_flops(grids, width, out),
        shape={"grids": [list(grid) for grid in grids], **shape},
    )


def cases(device_type: str) -> Iterator[Case]:
    if device_type == "cpu":
        for grids in ([(36, 36)], [(8, 8)] * 4 + [(12, 12)]):
            yield case(grids, vision_of(TINY).width, TINY.decoder.hidden)
        return
    vision = vision_of(BIG)
    square, largest = (views_of(side, side, vision) for side in (2016, 3024))
    for grids in (photo(), global_view(), crop(), square, largest):
        yield case(grids, vision.width, BIG.decoder.hidden)
    yield case(photo(), vision.width, BIG.decoder.hidden, scattered=True)


def checks() -> Iterator[Case]:
    yield case([(5, 7), (4, 4), (4, 4)], width=24, out=40)
    yield case([(1, 1), (13, 9), (1, 6)], width=40, out=72)
    yield case([(6, 5), (3, 8)], width=24, out=40, scattered=True)


def formula(
    x: Tensor,
    grids: Sequence[Grid],
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    folded: object,
    out: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, ...]:
    views = [downsample(view, grid, (w1, b1), (w2, b2)) for view, grid in split_views(x, grids)]
    result = torch.cat(views) @ w3.T
    if out is None:
        return (result,)
    out[rows] = result
    return (out,)


OP = Op(
    name="projector",
    rank=110,
    run=projector,
    varies="x",
    cases=cases,
    checks=checks,
    formula=formula,
    tolerance_16=Error(5, 1),
    tolerance_32=Error(200, 42),
    writes=("out",),
    peers=(
        Peer("cudnn", "projector", cudnn, CUDNN),
        Peer("cudnn-folded", "projector", partial(cudnn, folded=True), CUDNN),
        Peer("compile", "projector", partial(compiled, projector), COMPILE),
    ),
)
