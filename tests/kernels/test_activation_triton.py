"""The Triton forms of silu_mul and quick_gelu against their definitions."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from bench.errors import errors
from kernels.activation import quick_gelu, silu_mul
from kernels.runtime.configs import use_config
from tests.kernels.runtime.ptx_errors import DIV_ULP, sigmoid_error
from tests.support import ROOT

# For few and many rows and two dtypes: shared memory, loads, and instructions that move data
# between threads.
COMPILED = """
import json, re
import torch
from kernels.compile.launches import compiler, launches_recorded
from kernels.runtime.configs import H200
from kernels.activation import silu_mul

found = []
for rows in (16, 4096):
    for dtype in (torch.bfloat16, torch.float32):
        with launches_recorded(H200) as launches:
            silu_mul(torch.empty(rows, 24576, dtype=dtype), interleaved=True, impl="triton")
        with compiler(H200):
            compiled = launches[0].compile()
        sass = compiled.asm["sass"]
        names = re.findall(r"(?:LDG|SHFL|LDS|STS|BAR)[.A-Z0-9]*", sass)
        loads = [name for name in names if name.startswith("LDG")]
        moves = [name for name in names if not name.startswith("LDG")]
        found.append((compiled.metadata.shared, loads, moves))
print(json.dumps(found))
"""
BLOCK = 16
BOTH = ("triton", "eager")
# fp32: roundings only; `agree` adds the errors of a GPU's exponentials and divisions. 16 bits: a
# value halfway between two may round to the other one, which silu_mul multiplies and rounds again.
TOLERANCES = {torch.float32: 5e-7, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def draw(rows: int, width: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Inputs of silu_mul and of quick_gelu for results [rows, width]."""
    return tuple((torch.randn(rows, n) * 4).to(device, dtype) for n in (2 * width, width))


def both(gate_up: Tensor, x: Tensor, impl: str) -> list[Tensor]:
    with use_config("silu_mul", block=BLOCK), use_config("quick_gelu", block=BLOCK):
        return [silu_mul(gate_up, impl=impl), quick_gelu(x, impl=impl)]


def agree(result: Tensor, expected: Tensor, sigmoid_of: Tensor) -> bool:
    """Whether each element is as close to `expected` as its dtype and instructions allow."""
    limit = TOLERANCES[result.dtype]
    if result.dtype == torch.float32:
        limit = limit + sigmoid_error(sigmoid_of) * 2.0**-24
    return bool((errors(result, expected) <= limit).all())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, id="bf16")]
)
@pytest.mark.parametrize(
    ("rows", "width"),
    [
        (0, 16),  # no rows
        (3, 0),  # no columns
        (1, 1),
        (3, 15),  # a tile minus one
        (3, 16),
        (3, 17),  # a tile plus one
        (7, 53),  # primes, several tiles
    ],
)
def test_values(rows: int, width: int, dtype: torch.dtype, triton_device: str):
    """Guards every element: from its own row, with the gate first, and none left unwritten."""
    inputs = draw(rows, width, dtype, triton_device)
    before = [tensor.clone() for tensor in inputs]
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    try:
        got, want = both(*inputs, "triton"), both(*inputs, "eager")
    finally:
        torch.use_deterministic_algorithms(False)
    sigmoids = (inputs[0][:, :width], 1.702 * inputs[1])
    for result, expected, x in zip(got, want, sigmoids, strict=True):
        assert result.dtype == dtype
        assert agree(result, expected, x)
        if dtype != torch.float32 and result.numel() > 100:
            assert (result != expected).float().mean() < 0.01
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, id="bf16")]
)
@pytest.mark.parametrize("width", [0, 1, 15, 16, 17, 53])  # around one tile, and several
def test_interleaved_pairs(width: int, dtype: torch.dtype, triton_device: str):
    """Guards the interleaved layout: its bits are those of the halves layout, also at the ends of
    tiles and rows, and for rows of a wider tensor."""
    halves, _ = draw(3, width, dtype, triton_device)
    wide = torch.full((3, 2 * width + 6), torch.nan, dtype=dtype, device=triton_device)
    pairs = wide[:, 2 : 2 + 2 * width]
    pairs[:, ::2], pairs[:, 1::2] = halves.chunk(2, dim=1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    try:
        with use_config("silu_mul", block=BLOCK):
            got = silu_mul(pairs, interleaved=True, impl="triton")
            want = silu_mul(halves, impl="triton")
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(got, want) and not got.isnan().any()


@pytest.mark.cli
def test_pairs_are_split_in_registers():
    """Guards the width of loads and the split of pairs: with a store as wide as the loads, the
    compiler would exchange results through shared memory and a barrier."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)
    assert len(rows) == 4
    for shared, loads, moves in rows:
        assert (shared, moves) == (0, []) and set(loads) == {"LDG.E.128"}


@pytest.mark.parametrize("rows", [1, 300])
def test_default_configs(rows: int, triton_device: str):
    """Guards the kernel configs that the rule chooses for few and for many rows."""
    gate_up, x = draw(rows, 1030, torch.float32, triton_device)
    if rows > 1:
        gate_up, x = gate_up[:, :6].contiguous(), x[:, :3].contiguous()
    assert agree(*(silu_mul(gate_up, impl=impl) for impl in BOTH), gate_up.chunk(2, dim=1)[0])
    assert agree(*(quick_gelu(x, impl=impl) for impl in BOTH), 1.702 * x)


def test_rows_are_independent(triton_device: str):
    """Guards bits: the same for a row alone, at any index, and in a view of a wider tensor."""
    gate_up, x = draw(5, 24, torch.float32, triton_device)
    whole = both(gate_up, x, "triton")
    wide = [torch.cat((tensor, tensor), 1)[:, tensor.shape[1] :] for tensor in (gate_up, x)]
    assert all(map(torch.equal, whole, both(*wide, "triton")))
    for i in range(5):
        alone = both(gate_up[i : i + 1], x[i : i + 1], "triton")
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, whole, strict=True))


@pytest.mark.filterwarnings("ignore:overflow")  # from NumPy's exp in the interpreter
def test_extremes_stay_finite(triton_device: str):
    """Guards against NaN from an overflow of exp where the sigmoid saturates."""
    x = torch.tensor([[-1e4, -100.0, -0.0, 0.0, 100.0, 1e4]], device=triton_device)
    silu, gelu = both(torch.cat((x, torch.ones_like(x)), 1), x, "triton")
    for result in (silu, gelu):  # 1 / 1 is a division, too
        torch.testing.assert_close(result, x.relu(), rtol=DIV_ULP * 2**-23, atol=0)


def test_bad_arguments_are_named(triton_device: str):
    """Guards the checks before a launch: strides that the kernels cannot read are refused."""
    turned = torch.zeros(4, 6, device=triton_device).t()
    with pytest.raises(ValueError, match="silu_mul: gate_up must have neighbouring columns"):
        silu_mul(turned, impl="triton")
    with pytest.raises(ValueError, match="quick_gelu: x must have neighbouring columns"):
        quick_gelu(turned, impl="triton")
