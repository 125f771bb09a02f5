"""patchify against torch's unfold and pixel by pixel, in every form."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.patchify import patchify, row_width
from kernels.runtime.configs import use_config
from tests.support import ROOT

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, id="bf16")]
FORMS = ["eager", "portable", "triton"]

# The width of stores, and shared memory, for bytes and for numbers.
COMPILED = """
import json, re
import torch
from kernels.compile.launches import compiler, launches_recorded
from kernels.runtime.configs import H200
from kernels.patchify import patchify

views = [torch.empty(70, 70, 3, dtype=torch.uint8), torch.empty(3, 70, 70)]
table, found = torch.empty(3, 256, dtype=torch.bfloat16), []
with launches_recorded(H200) as launches:
    patchify(views, table, size=14, impl="triton")
with compiler(H200):
    for launch in launches:
        compiled = launch.compile()
        stores = re.findall(r"(?:STG|STS|SHFL|BAR)[.A-Z0-9]*", compiled.asm["sass"])
        found.append((compiled.metadata.shared, sorted(set(stores))))
print(json.dumps(found))
"""


def drawn(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def table_of(dtype: torch.dtype, device: str = "cpu") -> Tensor:
    return torch.randn(3, 256).to(device, dtype)


def unfolded(view: Tensor, table: Tensor, size: int) -> Tensor:
    """A view's rows by torch's unfold, in fp32, which holds every dtype's values."""
    if view.dtype == torch.uint8:
        view = torch.stack([table[c].float()[view[:, :, c].long()] for c in range(3)])
    view = view.to(table.dtype).float()  # one rounding
    return F.unfold(view[None], size, stride=size)[0].T


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 3, 14])  # rows of 3, 12, 27 and 588 values
def test_against_unfold(size: int, dtype: torch.dtype, impl: str, triton_device: str):
    """Guards every value: from its own pixel and channel, rounded once, in views of both kinds, of
    one patch, one row or one column, with zeros in the padding and nothing left unwritten."""
    table = table_of(dtype, triton_device)
    views = [
        drawn(1, size, size, 3),
        torch.randn(3, 2 * size, 5 * size),
        drawn(2, 3 * size, size, 3),
        torch.randn(3, size, 7 * size).to(dtype),
        drawn(3, 2 * size, 3 * size, 3),
        torch.randn(3, size, size, dtype=torch.float16),
    ]
    views = [view.to(triton_device) for view in views]
    before = [view.clone() for view in views]
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    try:
        with use_config("patchify", block=64):  # ends within rows, views end within blocks
            rows = patchify(views, table, size=size, impl=impl)
    finally:
        torch.use_deterministic_algorithms(False)
    expected = torch.cat([unfolded(view, table, size) for view in views])
    values = 3 * size * size
    assert rows.dtype == dtype and rows.shape == (len(expected), row_width(size))
    assert torch.equal(rows[:, :values].float(), expected)
    assert not rows[:, values:].any()
    assert all(map(torch.equal, views, before))


@pytest.mark.parametrize("impl", FORMS)
def test_windows_of_a_larger_image(impl: str, triton_device: str):
    """Guards strides: views that are parts of an image, of a batch, and turned."""
    table, image = table_of(torch.float32, triton_device), drawn(1, 30, 40, 3).to(triton_device)
    numbers = torch.randn(3, 40, 30, device=triton_device)
    views = [image[5:11, 7:19], image[1:7].transpose(0, 1)[:12], numbers[:, 3:9, ::5]]
    rows = patchify(views, table, size=6, impl=impl)
    copies = [view.contiguous() for view in views]
    assert torch.equal(rows, patchify(copies, table, size=6, impl=impl))
    assert torch.equal(rows[:, :108], torch.cat([unfolded(view, table, 6) for view in views]))


def test_pixel_by_pixel():
    """Guards the order [channel, y, x] in a row, and of rows, by indices alone."""

    @given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))
    def check(size: int, rows: int, columns: int) -> None:
        view, table = drawn(size, size * rows, size * columns, 3), table_of(torch.float32)
        out = patchify([view], table, size=size).tolist()
        table, view = table.tolist(), view.tolist()  # a byte as a tensor would be a mask
        for y in range(size * rows):
            for x in range(size * columns):
                for c in range(3):
                    patch = y // size * columns + x // size
                    place = c * size * size + y % size * size + x % size
                    assert out[patch][place] == table[c][view[y][x][c]]

    check()


def test_rows_are_those_of_a_convolution():
    """Guards the match with a convolution's weight, [out, channel, y, x]."""
    view, weight = torch.randn(3, 28, 42, dtype=torch.float32), torch.randn(5, 3, 14, 14)
    rows = patchify([view], table_of(torch.float32), size=14)
    product = rows[:, :588] @ weight.flatten(1).T
    expected = F.conv2d(view[None], weight, stride=14)[0].flatten(1).T
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("impl", FORMS)
def test_nothing_to_do(impl: str, triton_device: str):
    """Guards no views, and a view without pixels next to one with."""
    table = table_of(torch.bfloat16, triton_device)
    assert patchify([], table, size=14, impl=impl).shape == (0, 592)
    view = drawn(1, 14, 28, 3).to(triton_device)
    rows = patchify([view[:0], view, view[:, :0]], table, size=14, impl=impl)
    assert torch.equal(rows, patchify([view], table, size=14, impl=impl)) and len(rows) == 2


def test_rows_begin_at_16_bytes():
    """Guards the alignment that fast products need, in 16 bits."""
    for size in range(1, 33):
        assert row_width(size) * 2 % 16 == 0
        assert 0 <= row_width(size) - 3 * size * size < 8
    assert row_width(14) == 592


@pytest.mark.cli
def test_stores_are_wide():
    """Guards stores of 16 bytes, straight from registers, for views at any address."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == [[0, ["STG.E.128"]]] * 2


def test_mistakes_are_named():
    """Guards against layouts taken for others, and dropped pixels."""
    table, view = table_of(torch.float32), torch.zeros(3, 28, 28)
    for views, options, message in [
        ([view, view.byte()], {}, "view 1 has shape [3, 28, 28]; in torch.uint8 it must be [heig"),
        ([view.permute(1, 2, 0)], {}, "view 0 has shape [28, 28, 3]; in torch.float32 it must be"),
        (
            [view[0]],
            {},
            "view 0 has shape [28, 28]; in torch.float32 it must be [3, height, width]",
        ),
        ([view.double()], {}, "view 0 must be uint8, fp32, bf16 or fp16, not torch.float64"),
        ([view.to("meta")], {}, "view 0 must be on cpu like table"),
        ([view[:, 1:]], {}, "view 0 has 27 x 28 pixels; sides must be multiples of 14"),
        ([view], {"size": 0}, "size must be 1 or more, not 0"),
        ([view], {"table": table[:, 1:]}, "table must be [3, 256], not [3, 255]"),
        ([view], {"table": table.double()}, "table must be fp32, bf16 or fp16, not torch.float64"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            patchify(views, **{"table": table, "size": 14} | options)
