"""Patches of image views as rows, the input of the vision tower's patch embedding."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.errors import Error
from bench.inputs.draws import Device, NormalDraws
from bench.inputs.presets import BIG, vision_of
from bench.inputs.views import crop, global_view, named, photo, views_of
from bench.peers.compile_peer import COMPILE, compiled
from bench.peers.peer import Peer
from bench.suite.op import NONE, Case, Op, Shape
from kernels.patchify import patchify, row_width
from kernels.runtime.grids import Grid, tokens_of


def inputs(
    seed: int,
    device: Device,
    dtype: torch.dtype,
    *,
    grids: Sequence[Grid],
    resized: Sequence[Grid],
    size: int,
) -> dict:
    """Views of `grids` are bytes; those of `resized` follow, in fp32."""
    draw = NormalDraws(seed, device, dtype)
    views = [
        torch.randint(
            0, 256, (size * rows, size * columns, 3), generator=draw.host, dtype=torch.uint8
        ).to(device)
        for rows, columns in grids
    ]
    wide = NormalDraws(seed, device, torch.float32)
    views += [wide(3, size * rows, size * columns) for rows, columns in resized]
    return {"table": draw(3, 256), "views": tuple(views), "size": size}


def case(grids: Sequence[Grid], resized: Sequence[Grid] = (), size: int = 14) -> Case:
    shape: Shape = {"grids": tuple(grids), "resized": tuple(resized), "size": size}
    kinds = {"": grids, " fp32": resized}
    pixels = 3 * size * size
    return Case(
        op="patchify",
        name=" + ".join(named(views) + kind for kind, views in kinds.items() if views),
        inputs=partial(inputs, **shape),
        values=(tokens_of(grids) + tokens_of(resized)) * row_width(size) + 3 * 256,
        flops=0,
        fixed_bytes=pixels * (tokens_of(grids) + 4 * tokens_of(resized)),
        shape={"size": size} | {"grids": [list(grid) for grid in (*grids, *resized)]},
    )


def cases(device_type: str) -> Iterator[Case]:
    if device_type == "cpu":
        yield case(crop(), global_view())
        return
    *crops, whole = photo()
    yield case(crops, [whole])  # crops that fill their window are not resized
    yield case(global_view())
    yield case(views_of(3024, 3024, vision_of(BIG)))


def checks() -> Iterator[Case]:
    yield case([(1, 1), (5, 7)], [(2, 3)])
    yield case([(3, 4)], [(1, 1)], size=3)  # rows of 27 values are padded to 32
    yield case([], [(13, 9)], size=2)


def formula(table: Tensor, views: Sequence[Tensor], size: int) -> tuple[Tensor, ...]:
    """Pixel by pixel: a patch's number and the place in it, from the pixel's coordinates."""
    rows = []
    for view in views:
        numbers = view.cpu()
        if view.dtype == torch.uint8:
            numbers = torch.stack([table[c][numbers[:, :, c].long()] for c in range(3)])
        c, y, x = torch.meshgrid(*map(torch.arange, numbers.shape), indexing="ij")
        patch = y // size * (numbers.shape[2] // size) + x // size
        place = (c * size + y % size) * size + x % size
        out = torch.zeros(int(patch.max()) + 1, row_width(size), dtype=table.dtype)
        out[patch, place] = numbers.to(table.dtype)
        rows.append(out)
    return (torch.cat(rows),)


OP = Op(
    name="patchify",
    rank=75,
    run=patchify,
    varies="table",  # in a model the bytes; but values that follow the table have been looked up
    cases=cases,
    checks=checks,
    formula=formula,
    tolerance_16=Error(1, 0.3),  # fp32 views are rounded once
    tolerance_32=NONE,
    peers=(Peer("compile", "patchify", partial(compiled, patchify), COMPILE),),
)
