"""Linear layers and convolutions by the Triton product, against fp64, under cuts of every kind."""

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
# Sums of another order in fp32; for 16 bits rounded once.
TOLERANCES = {torch.float32: 5e-6, torch.float16: 2**-11 * 1.01, torch.bfloat16: 2**-8 * 1.01}
TILE = 16
WHOLE, CUT = {"overhead": 1000}, {"overhead": 0}


@pytest.fixture(autouse=True)
def small_tiles():
    """Few SMs and small tiles: whole rounds and cut tiles from small inputs; tiles cut everywhere.

    What nobody has written, in results and in the workspace, is NaN.
    """
    torch.use_deterministic_algorithms(True)
    with assume_gpu(toy(5)), use_config("gemm", **tile(), **CUT):
        yield
    torch.use_deterministic_algorithms(False)


def toy(sms: int) -> Gpu:
    return Gpu("toy", arch=90, sms=sms, shared_bytes=227 * 1024)


def tile(m: int = TILE, n: int = TILE, k: int = TILE) -> dict[str, int]:
    """Also free of what the rule would choose for other sizes of tiles."""
    shape = {"block_m": m, "block_n": n, "block_k": k}
    return shape | {"num_warps": 4, "num_stages": 2, "programs": 1, "tma": 0}


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str) -> list[Tensor]:
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


def layer(rows: int, width: int, channels: int, **options) -> list[Tensor]:
    """x, weight and bias; sums of about 1."""
    x, weight, bias = draw((rows, channels), (width, channels), (width,), **options)
    return [x, weight / channels**0.5, bias]


def kernel(width: int, channels: int, **options) -> Tensor:
    weight = draw((width, channels, 3, 3), **options)[0] / (9 * channels) ** 0.5
    return weight.to(memory_format=torch.channels_last)


def convolved(x: Tensor, grids: list, weight: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's convolution of each view by itself, in fp64."""
    outs, start = [], 0
    for rows, columns in grids:
        view = x[start : start + rows * columns].double().view(rows, columns, -1)
        wide = None if bias is None else bias.double()
        image = view.permute(2, 0, 1)[None]
        out = F.conv2d(image, weight.double(), wide, stride=2, padding=1)
        outs.append(out[0].flatten(1).T)
        start += rows * columns
    return torch.cat(outs)


@pytest.mark.parametrize("options", [WHOLE, CUT, {"overhead": 1}], ids=["whole", "cut", "some"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize(
    "shape",
    [  # rows, width, channels
        (1, 1, 1),  # nothing
        (16, 16, 16),  # one tile of one step
        (17, 15, 31),  # one more and one less than a tile on every axis
        (15, 33, 48),
        (80, 16, 64),  # as many tiles as programs: a round and nothing more
        (37, 53, 130),  # primes, and 12 tiles: two rounds and two tiles
        (3, 16, 400),  # one tile of many steps for all programs
    ],
)
def test_linear(shape: tuple, dtype: torch.dtype, options: dict, triton_device: str):
    """Every size of remainder on every axis; whole tiles, cut tiles, and both in one product."""
    x, weight, bias = layer(*shape, dtype=dtype, device=triton_device)
    with use_config("gemm", **options):
        out = linear(x, weight, bias)
        plain = linear(x, weight)
    expected = F.linear(x.double(), weight.double())
    assert out.dtype == dtype and out.shape == shape[:2]
    assert max_error(plain, expected) < TOLERANCES[dtype]
    assert max_error(out, expected + bias.double()) < TOLERANCES[dtype]


@pytest.mark.parametrize("options", [WHOLE, CUT], ids=["whole", "cut"])
@pytest.mark.parametrize("channels", [1, 16, 24, 48])
@pytest.mark.parametrize(
    "grids",
    [
        [(1, 1)],
        [(4, 6)],
        [(5, 7), (2, 2), (1, 9), (9, 1)],  # odd sides, sides of one, each with columns of its own
        [(3, 3)] * 7,  # neighbours of one grid: taps of one view must not see the next
    ],
)
def test_convolution(grids: list, channels: int, options: dict, triton_device: str):
    """Channels less than a block, whole blocks, and between; all taps in and out of the view."""
    tokens = sum(rows * columns for rows, columns in grids)
    x, bias = draw((tokens, channels), (21,), device=triton_device)
    weight = kernel(21, channels, device=triton_device)
    with use_config("gemm", **options):
        out = convolution(x, grids, weight, bias)
    assert max_error(out, convolved(x, grids, weight, bias)) < TOLERANCES[torch.float32]


def test_convolution_in_16_bits(triton_device: str):
    """Sums stay fp32 through the workspace and are rounded once."""
    (x,) = draw((35, 48), dtype=torch.float16, device=triton_device)
    weight = kernel(21, 48, dtype=torch.float16, device=triton_device)
    out = convolution(x, [(5, 7)], weight)
    assert max_error(out, convolved(x, [(5, 7)], weight, None)) < TOLERANCES[torch.float16]


@pytest.mark.parametrize("options", [WHOLE, CUT], ids=["whole", "cut"])
def test_tensor_copies(options: dict, triton_device: str):
    """Blocks by descriptors, which fill with zeros what is beyond the last row or column.

    Rows that they cannot read are read without.
    """
    with use_config("gemm", tma=1, **options):
        x, weight, bias = layer(37, 53, 48, device=triton_device)
        expected = F.linear(x.double(), weight.double(), bias.double())
        assert max_error(linear(x, weight, bias), expected) < TOLERANCES[torch.float32]
        grids, conv = [(5, 7), (1, 2)], kernel(53, 48, device=triton_device)
        expected = convolved(x, grids, conv, bias)
        assert max_error(convolution(x, grids, conv, bias), expected) < TOLERANCES[torch.float32]
        x, weight, _ = layer(37, 53, 49, device=triton_device)  # rows begin on 4 bytes
        x, weight = x[:, 1:], weight[:, 1:].contiguous()
        expected = F.linear(x.double(), weight.double())
        assert max_error(linear(x, weight), expected) < TOLERANCES[torch.float32]


def test_windows():
    """By brute force: which token each tap of each output sees."""
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
def test_every_cut_is_a_whole_product(m_tiles: int, n_tiles: int, sms: int, triton_device: str):
    """Lanes of equal and of unequal length, more and fewer programs than tiles, bands of tiles."""
    x, weight, bias = layer(16 * m_tiles, 16 * n_tiles, 3 * 16, device=triton_device)
    with assume_gpu(toy(sms)):
        out = linear(x, weight, bias)
    expected = F.linear(x.double(), weight.double(), bias.double())
    assert max_error(out, expected) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("sms", [1, 5, 108, 132])
@pytest.mark.parametrize("overhead", [0, 3, 16])
def test_cuts_hold_all_the_work(sms: int, overhead: int):
    """Each step is somebody's, the workspace at most two tiles per program, stretches long enough.

    A cut is only made if it shortens the longest program's work by more than it costs.
    """
    for m_tiles in (1, 2, 3, 7, 8, 17, 97):
        for n_tiles in (1, 5, 12, 16):
            for steps in (1, 9, 216):
                cut = stream_k(m_tiles, n_tiles, steps, sms, overhead)
                work = [cut.work(program) for program in range(sms)]
                assert sum(work) == m_tiles * n_tiles * steps
                assert cut.partials <= 2 * sms
                assert cut.rest < sms and cut.whole + cut.rest == m_tiles * n_tiles
                if cut.rest:
                    rounds = cut.whole // sms
                    assert max(work) <= rounds * steps + cut.share
                    assert overhead <= cut.share < steps - overhead


@pytest.mark.parametrize("sms", [108, 132])
@pytest.mark.parametrize("width,steps,first,more", [(3072, 216, 676, 324), (4096, 432, 169, 81)])
def test_programs_have_equal_work(sms: int, width: int, steps: int, first: int, more: int):
    """Both convolutions of the 10B, for the global view and up to 36 crops, in tiles of 128 x 256.

    Within 2 %, or what a further cut would cost.
    """
    overhead = 16
    for crops in range(37):
        rows = first + crops * more
        cut = stream_k(-(-rows // 128), -(-width // 256), steps, sms, overhead)
        work = [cut.work(program) for program in range(sms)]
        assert max(work) <= max(1.02 * sum(work) / sms, sum(work) / sms + overhead)


def test_a_panel_of_the_weight_is_read_at_one_time():
    """Programs side by side work on all rows of one panel, at one place in K."""
    cut = stream_k(2, 16, 432, 132, 16)
    assert (cut.whole, cut.rest, cut.lanes) == (0, 32, 2)
    cut = stream_k(6, 12, 216, 132, 16)
    assert (cut.whole, cut.rest, cut.lanes) == (0, 72, 6)


@pytest.mark.parametrize("options", [WHOLE, CUT], ids=["whole", "cut"])
def test_rows_of_out(options: dict, triton_device: str):
    """Results scatter to the rows named; other rows, and columns beyond, stay as they were."""
    x, weight, bias = layer(37, 19, 70, device=triton_device)
    whole = torch.full((60, 24), 7.0, device=triton_device)
    out, rows = whole[:, :19], torch.randperm(60)[:37].to(triton_device)
    with use_config("gemm", **options):
        assert linear(x, weight, bias, out=out, rows=rows) is out
        assert torch.equal(out[rows], linear(x, weight, bias))
    others = torch.ones(60, dtype=torch.bool)
    others[rows.cpu()] = False
    assert (whole[others.to(triton_device)] == 7).all() and (whole[:, 19:] == 7).all()


@pytest.mark.parametrize("options", [WHOLE, CUT], ids=["whole", "cut"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
def test_quick_gelu(options: dict, dtype: torch.dtype, triton_device: str):
    """The activation sees the sum as rounded to the dtype; only it and one rounding come after."""
    x, weight, bias = layer(37, 19, 70, dtype=dtype, device=triton_device)
    with use_config("gemm", **options):
        out = linear(x, weight, bias, quick_gelu=True)
        z = linear(x, weight, bias).double()
    assert max_error(out, z * torch.sigmoid(1.702 * z)) < TOLERANCES[dtype]


def test_the_same_every_time(triton_device: str):
    """And apart from the order of sums whatever the other rows are."""
    x, weight, bias = layer(37, 19, 200, device=triton_device)
    out = linear(x, weight, bias)
    assert torch.equal(out, linear(x, weight, bias))
    assert max_error(linear(x[20:23], weight, bias), out[20:23].double()) < 5e-6


def test_inputs_in_wider_rows(triton_device: str):
    """Rows of x need not be next to each other; what lies between is never part of a sum."""
    x, weight, bias = layer(35, 19, 40, device=triton_device)
    apart = torch.full((35, 60), torch.nan, device=triton_device)
    apart[:, 5:45] = x
    assert torch.equal(linear(apart[:, 5:45], weight, bias), linear(x, weight, bias))
    weight = kernel(19, 40, device=triton_device)
    got = convolution(apart[:, 5:45], [(5, 7)], weight)
    assert torch.equal(got, convolution(x, [(5, 7)], weight))


def test_nothing_to_do(triton_device: str):
    x, weight, bias = layer(0, 19, 48, device=triton_device)
    assert linear(x, weight, bias).shape == (0, 19)
    assert convolution(x, [], kernel(19, 48, device=triton_device), bias).shape == (0, 19)
    out = torch.ones(3, 19, device=triton_device)
    assert linear(x, weight, out=out, rows=torch.arange(0, device=triton_device)) is out


def test_candidates_name_every_choice():
    """What tuning measures has all that the launcher asks for, and no two alike."""
    for key in ("M<=1024 N3072 C1536 conv", "M<=64 N8 C8 linear fp32"):
        for arch in (80, 90):
            found = TUNABLE.candidates(key, Gpu("toy", arch, 100, 160 * 1024))
            assert all(set(one) == {*tile(), "overhead"} for one in found)
            assert len({tuple(one.items()) for one in found}) == len(found)
            assert arch >= 90 or not any(one["tma"] for one in found)


def test_mistakes_are_named(triton_device: str):
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
        ("come together", lambda: linear(x, weight, out=out)),
        ("come together", lambda: linear(x, weight, rows=rows)),
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
