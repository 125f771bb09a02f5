"""The Triton GEMM as linear layer and convolution against fp64, with tiles whole and split."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gemm import convolution, halved, linear, windows_of
from kernels.gemm.op import TUNABLE
from kernels.gemm.stream_k import BAND, stream_k
from kernels.runtime.configs import Gpu, assume_gpu, use_config
from tests.support.errors import max_error

BF16 = pytest.param(torch.bfloat16, id="bf16")
# fp32: sums in another order. 16 bits: one rounding.
TOLERANCES = {torch.float32: 5e-6, torch.float16: 2**-11 * 1.01, torch.bfloat16: 2**-8 * 1.01}
TILE = 16
WHOLE, SPLIT = {"overhead": 1000}, {"overhead": 0}


@pytest.fixture(autouse=True)
def small_tiles():
    """Few SMs, small tiles, and splitting for free: small inputs have whole waves and split tiles.

    Unwritten elements of results and of the workspace are NaN.
    """
    torch.use_deterministic_algorithms(True)
    with assume_gpu(toy(5)), use_config("gemm", **tile(), **SPLIT):
        yield
    torch.use_deterministic_algorithms(False)


def toy(sms: int) -> Gpu:
    return Gpu("toy", arch=90, sms=sms, shared_bytes=227 * 1024)


def tile(m: int = TILE, n: int = TILE, k: int = TILE) -> dict[str, int]:
    """A kernel config for tiles of m x n x k that does not depend on the rule."""
    shape = {"block_m": m, "block_n": n, "block_k": k}
    return shape | {"num_warps": 4, "num_stages": 2, "programs": 1, "tma": 0}


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str) -> list[Tensor]:
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


def layer(rows: int, width: int, channels: int, **options) -> list[Tensor]:
    """x, weight and bias, drawn so that sums are about 1."""
    x, weight, bias = draw((rows, channels), (width, channels), (width,), **options)
    return [x, weight / channels**0.5, bias]


def kernel(width: int, channels: int, **options) -> Tensor:
    weight = draw((width, channels, 3, 3), **options)[0] / (9 * channels) ** 0.5
    return weight.to(memory_format=torch.channels_last)


def convolved(x: Tensor, grids: list, weight: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's convolution of each view on its own, in fp64."""
    outs, start = [], 0
    for rows, columns in grids:
        view = x[start : start + rows * columns].double().view(rows, columns, -1)
        wide = None if bias is None else bias.double()
        image = view.permute(2, 0, 1)[None]
        out = F.conv2d(image, weight.double(), wide, stride=2, padding=1)
        outs.append(out[0].flatten(1).T)
        start += rows * columns
    return torch.cat(outs)


@pytest.mark.parametrize("options", [WHOLE, SPLIT, {"overhead": 1}], ids=["whole", "split", "some"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize(
    "shape",
    [  # rows, width, channels
        (1, 1, 1),  # the smallest product
        (16, 16, 16),  # one tile of one step
        (17, 15, 31),  # one more or one less than a tile on every axis
        (15, 33, 48),
        (80, 16, 64),  # as many tiles as programs: one wave and no remainder
        (37, 53, 130),  # primes, and 12 tiles: two waves and two tiles
        (3, 16, 400),  # one tile whose many K steps are shared by all programs
    ],
)
def test_linear(shape: tuple, dtype: torch.dtype, options: dict, triton_device: str):
    """Guards every remainder on every axis, with whole tiles, with split tiles, and with both."""
    x, weight, bias = layer(*shape, dtype=dtype, device=triton_device)
    with use_config("gemm", **options):
        out = linear(x, weight, bias)
        plain = linear(x, weight)
    expected = F.linear(x.double(), weight.double())
    assert out.dtype == dtype and out.shape == shape[:2]
    assert max_error(plain, expected) < TOLERANCES[dtype]
    assert max_error(out, expected + bias.double()) < TOLERANCES[dtype]


@pytest.mark.parametrize("options", [WHOLE, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("channels", [1, 16, 24, 48])
@pytest.mark.parametrize(
    "grids",
    [
        [(1, 1)],
        [(4, 6)],
        [(5, 7), (2, 2), (1, 9), (9, 1)],  # odd sides and sides of one, all of different widths
        [(3, 3)] * 7,  # equal views: taps of one view must not read the next
    ],
)
def test_convolution(grids: list, channels: int, options: dict, triton_device: str):
    """Guards channels below, at and above one block, and taps inside and outside the view."""
    tokens = sum(rows * columns for rows, columns in grids)
    x, bias = draw((tokens, channels), (21,), device=triton_device)
    weight = kernel(21, channels, device=triton_device)
    with use_config("gemm", **options):
        out = convolution(x, grids, weight, bias)
    assert max_error(out, convolved(x, grids, weight, bias)) < TOLERANCES[torch.float32]


def test_convolution_in_16_bits(triton_device: str):
    """Guards fp32 sums: they stay fp32 through the workspace and are rounded once."""
    (x,) = draw((35, 48), dtype=torch.float16, device=triton_device)
    weight = kernel(21, 48, dtype=torch.float16, device=triton_device)
    out = convolution(x, [(5, 7)], weight)
    assert max_error(out, convolved(x, [(5, 7)], weight, None)) < TOLERANCES[torch.float16]


@pytest.mark.parametrize("options", [WHOLE, SPLIT], ids=["whole", "split"])
def test_tensor_copies(options: dict, triton_device: str):
    """Guards loads by TMA descriptors, which fill with zeros beyond the last row or column.

    Rows that descriptors cannot read are loaded by pointers.
    """
    with use_config("gemm", tma=1, **options):
        x, weight, bias = layer(37, 53, 48, device=triton_device)
        expected = F.linear(x.double(), weight.double(), bias.double())
        assert max_error(linear(x, weight, bias), expected) < TOLERANCES[torch.float32]
        grids, conv = [(5, 7), (1, 2)], kernel(53, 48, device=triton_device)
        expected = convolved(x, grids, conv, bias)
        assert max_error(convolution(x, grids, conv, bias), expected) < TOLERANCES[torch.float32]
        x, weight, _ = layer(37, 53, 49, device=triton_device)  # rows aligned to 4 bytes only
        x, weight = x[:, 1:], weight[:, 1:].contiguous()
        expected = F.linear(x.double(), weight.double())
        assert max_error(linear(x, weight), expected) < TOLERANCES[torch.float32]


def test_windows():
    """Guards the window table, by brute force: which token each tap of each output reads."""
    grids = ((5, 7), (1, 1), (2, 4), (1, 3))
    table, at, start = windows_of(grids, torch.device("cpu")).tolist(), 0, 0
    for (rows, columns), (out_rows, out_columns) in zip(grids, halved(grids), strict=True):
        assert (out_rows, out_columns) == ((rows + 1) // 2, (columns + 1) // 2)
        for i in range(out_rows):
            for j in range(out_columns):
                first, stride, inside = (line[at] for line in table)
                for tap in range(9):
                    row, column = 2 * i - 1 + tap // 3, 2 * j - 1 + tap % 3
                    valid = 0 <= row < rows and 0 <= column < columns
                    assert (inside >> tap & 1) == valid
                    token = first + tap // 3 * stride + tap % 3
                    assert not valid or token == start + row * columns + column
                at += 1
        start += rows * columns
    assert at == len(table[0])


@pytest.mark.parametrize("m_tiles,n_tiles", [(1, 3), (2, 3), (5, 2), (BAND + 3, 2)])
@pytest.mark.parametrize("sms", [1, 3, 5, 8, 13])
def test_all_divisions_give_the_product(m_tiles: int, n_tiles: int, sms: int, triton_device: str):
    """Guards lanes of equal and unequal length, programs more and fewer than tiles, bands of
    tiles."""
    x, weight, bias = layer(16 * m_tiles, 16 * n_tiles, 3 * 16, device=triton_device)
    with assume_gpu(toy(sms)):
        out = linear(x, weight, bias)
    expected = F.linear(x.double(), weight.double(), bias.double())
    assert max_error(out, expected) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("sms", [1, 5, 108, 132])
@pytest.mark.parametrize("overhead", [0, 3, 16])
def test_divisions_hold_all_the_work(sms: int, overhead: int):
    """Guards the division: every step belongs to one program, the workspace has at most two tiles
    per program, and work ranges are long enough.

    Tiles are split only if that shortens the longest program's work by more than it costs.
    """
    for m_tiles in (1, 2, 3, 7, 8, 17, 97):
        for n_tiles in (1, 5, 12, 16):
            for steps in (1, 9, 216):
                division = stream_k(m_tiles, n_tiles, steps, sms, overhead)
                work = [division.work(program) for program in range(sms)]
                assert sum(work) == m_tiles * n_tiles * steps
                assert division.partials <= 2 * sms
                assert division.rest < sms and division.whole + division.rest == m_tiles * n_tiles
                if division.rest:
                    waves = division.whole // sms
                    assert max(work) <= waves * steps + division.share
                    assert overhead <= division.share < steps - overhead


@pytest.mark.parametrize("sms", [108, 132])
@pytest.mark.parametrize("width,steps,first,more", [(3072, 216, 676, 324), (4096, 432, 169, 81)])
def test_programs_have_equal_work(sms: int, width: int, steps: int, first: int, more: int):
    """Guards the balance of both convolutions of the 10B, for the global view and up to 36 crops,
    in tiles of 128 x 256: within 2 % of the mean, or within the cost of one more split."""
    overhead = 16
    for crops in range(37):
        rows = first + crops * more
        division = stream_k(-(-rows // 128), -(-width // 256), steps, sms, overhead)
        work = [division.work(program) for program in range(sms)]
        assert max(work) <= max(1.02 * sum(work) / sms, sum(work) / sms + overhead)


def test_a_panel_of_the_weight_is_read_at_once():
    """Guards reuse in the L2 cache: neighbouring programs work on all rows of one panel of the
    weight, at the same place in K."""
    division = stream_k(2, 16, 432, 132, 16)
    assert (division.whole, division.rest, division.lanes) == (0, 32, 2)
    division = stream_k(6, 12, 216, 132, 16)
    assert (division.whole, division.rest, division.lanes) == (0, 72, 6)


@pytest.mark.parametrize("options", [WHOLE, SPLIT], ids=["whole", "split"])
def test_rows_of_out(options: dict, triton_device: str):
    """Guards the scatter: results go to the rows named; all other elements keep their values."""
    x, weight, bias = layer(37, 19, 70, device=triton_device)
    whole = torch.full((60, 24), 7.0, device=triton_device)
    out, rows = whole[:, :19], torch.randperm(60)[:37].to(triton_device)
    with use_config("gemm", **options):
        assert linear(x, weight, bias, out=out, rows=rows) is out
        assert torch.equal(out[rows], linear(x, weight, bias))
    others = torch.ones(60, dtype=torch.bool)
    others[rows.cpu()] = False
    assert (whole[others.to(triton_device)] == 7).all() and (whole[:, 19:] == 7).all()


@pytest.mark.parametrize("options", [WHOLE, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
def test_quick_gelu(options: dict, dtype: torch.dtype, triton_device: str):
    """Guards the rounding before the activation: it gets the sum rounded to the dtype, and its
    result is rounded once."""
    x, weight, bias = layer(37, 19, 70, dtype=dtype, device=triton_device)
    with use_config("gemm", **options):
        out = linear(x, weight, bias, quick_gelu=True)
        z = linear(x, weight, bias).double()
    assert max_error(out, z * torch.sigmoid(1.702 * z)) < TOLERANCES[dtype]


def test_runs_are_reproducible(triton_device: str):
    """Guards reproducible bits, and that other rows change no more than the order of sums."""
    x, weight, bias = layer(37, 19, 200, device=triton_device)
    out = linear(x, weight, bias)
    assert torch.equal(out, linear(x, weight, bias))
    assert max_error(linear(x[20:23], weight, bias), out[20:23].double()) < 5e-6


def test_inputs_in_wider_rows(triton_device: str):
    """Guards strided rows of x: the elements between them never enter a sum."""
    x, weight, bias = layer(35, 19, 40, device=triton_device)
    apart = torch.full((35, 60), torch.nan, device=triton_device)
    apart[:, 5:45] = x
    assert torch.equal(linear(apart[:, 5:45], weight, bias), linear(x, weight, bias))
    weight = kernel(19, 40, device=triton_device)
    got = convolution(apart[:, 5:45], [(5, 7)], weight)
    assert torch.equal(got, convolution(x, [(5, 7)], weight))


def test_nothing_to_do(triton_device: str):
    """Guards empty inputs: no rows, no views, and a scatter of no rows."""
    x, weight, bias = layer(0, 19, 48, device=triton_device)
    assert linear(x, weight, bias).shape == (0, 19)
    assert convolution(x, [], kernel(19, 48, device=triton_device), bias).shape == (0, 19)
    out = torch.ones(3, 19, device=triton_device)
    assert linear(x, weight, out=out, rows=torch.arange(0, device=triton_device)) is out


def test_candidates_are_complete():
    """Guards tuning: a candidate has every value that the launcher reads, and no two are equal."""
    for key in ("M<=1024 N3072 C1536 conv", "M<=64 N8 C8 linear fp32"):
        for arch in (80, 90):
            candidates = TUNABLE.candidates(key, Gpu("toy", arch, 100, 160 * 1024))
            assert all(set(config) == {*tile(), "overhead"} for config in candidates)
            assert len({tuple(config.items()) for config in candidates}) == len(candidates)
            assert arch >= 90 or not any(config["tma"] for config in candidates)


def test_mistakes_are_named(triton_device: str):
    """Guards the launchers' checks: each mistake raises a ValueError that names the argument."""
    x, weight, bias = layer(35, 19, 48, device=triton_device)
    conv = kernel(19, 48, device=triton_device)
    out, rows = torch.zeros(60, 19, device=triton_device), torch.arange(35, device=triton_device)
    cases = [
        (r"weight must be \[N, 48\]", lambda: linear(x, weight[:, 1:].contiguous())),
        ("weight must be contiguous", lambda: linear(x[:, :19], weight[:, :19])),
        (r"bias must be \[19\]", lambda: linear(x, weight, bias[1:])),
        ("weight must be torch.float32", lambda: linear(x, weight.half())),
        ("bias must be torch.float32", lambda: linear(x, weight, bias.half())),
        ("x must be fp32, bf16 or fp16", lambda: linear(x.double(), weight.double())),
        ("neighbouring channels", lambda: linear(x.T.contiguous().T, weight)),
        (r"x must be \[34, C\]", lambda: convolution(x, [(2, 17)], conv)),
        (r"weight must be \[N, 48, 3, 3\]", lambda: convolution(x, [(5, 7)], conv[:, 1:])),
        ("channels_last", lambda: convolution(x, [(5, 7)], conv.contiguous())),
        ("give both out and rows", lambda: linear(x, weight, out=out)),
        ("give both out and rows", lambda: linear(x, weight, rows=rows)),
        (r"out must be \[R, 19\]", lambda: linear(x, weight, out=out[:, 1:], rows=rows)),
        (r"int64 \[35\]", lambda: linear(x, weight, out=out, rows=rows[1:])),
        (r"int64 \[35\]", lambda: linear(x, weight, out=out, rows=rows.int())),
        ("out must be torch.float32", lambda: linear(x, weight, out=out.half(), rows=rows)),
        ("block_k must divide", lambda: _with_tma(x[:, :40].contiguous())),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()


def _with_tma(x: Tensor) -> Tensor:
    with use_config("gemm", tma=1):
        return linear(x, x)
