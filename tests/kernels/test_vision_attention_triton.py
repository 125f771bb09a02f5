"""The Triton form of vision attention: views of all shapes, every head_dim, each way to load.

Memory that a kernel leaves unwritten holds NaN.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from kernels.runtime.configs import A100, H200, use_config
from kernels.vision_attention import vision_attention
from kernels.vision_attention.kernel import Parts
from kernels.vision_attention.launch import TUNABLE, _geometry, launch
from tests.support.errors import max_error

BF16 = pytest.param(torch.bfloat16, id="bf16")
FP32, FP16 = 6e-6, 2**-9  # the latter: roundoffs of a rotated key and of a probability
SMALL = {"rows": 16, "block": 16, "num_warps": 4}
WAYS = {
    "pointers": {},
    "short last tiles": {"rows": 32, "block": 32},
    "tma": {"tma": 1, "rows": 32, "block": 32},
    "turned queries": {"turn_q": 1, "rows": 32, "block": 32},
    "turned queries, tma": {"turn_q": 1, "tma": 1, "rows": 32},
    "specialized": {"tma": 1, "specialize": 1},
}
SPECIALIZED_LAST = [
    pytest.param(way, marks=pytest.mark.slow_gpu if way == "specialized" else ()) for way in WAYS
]


@pytest.fixture(autouse=True)
def unwritten_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(grids: list, heads: int, dim: int, device: str, dtype: torch.dtype = torch.float32):
    tokens = sum(rows * columns for rows, columns in grids)
    generator = torch.Generator().manual_seed(dim)
    return torch.randn(tokens, 3 * heads * dim, generator=generator).to(device, dtype)


def run(qkv: Tensor, grids: list, heads: int, **chosen: int) -> Tensor:
    with use_config("vision_attention", **SMALL | chosen):
        return vision_attention(qkv, grids, heads=heads, impl="triton")


def by_hand(qkv: Tensor, grids: list, heads: int, theta: float = 1e4) -> Tensor:
    """In fp64: pairs as complex numbers, turned by exp(i angle), view by view and head by head."""
    dim = qkv.shape[1] // (3 * heads)
    frequencies = theta ** (-2 * torch.arange(dim // 4).double() / (dim // 2))
    outs, start = [], 0
    for rows, columns in grids:
        token = torch.arange(rows * columns)
        turns = [(x[:, None] * frequencies) for x in (token % columns, token // columns)]
        angle = torch.cat(turns, dim=1)
        view = qkv[start : start + rows * columns].double().cpu()
        start += rows * columns
        parts = []
        for head in view.view(rows * columns, 3, heads, dim).unbind(2):
            q, k = (
                torch.view_as_complex(head[:, i].reshape(-1, dim // 2, 2)) * torch.exp(1j * angle)
                for i in (0, 1)
            )
            scores = (q @ k.conj().T).real / dim**0.5
            parts.append(scores.softmax(-1) @ head[:, 2])
        outs.append(torch.cat(parts, dim=1))
    return torch.cat(outs)


@pytest.mark.parametrize("way", SPECIALIZED_LAST)
@pytest.mark.parametrize("dim", [64, 72, 80, 96, 128])
def test_head_dims(triton_device: str, dim: int, way: str):
    """Heads of one part, of two, and with elements to spare in the second; ragged views."""
    grids = [(3, 5), (4, 8), (1, 1)]
    qkv = draw(grids, 2, dim, triton_device)
    result = run(qkv, grids, 2, **WAYS[way])
    assert max_error(result.cpu(), by_hand(qkv, grids, 2)) < FP32


@pytest.mark.parametrize("turn_q", [0, 1])
@pytest.mark.parametrize("dim", [4, 16, 20, 36, 100])
def test_other_head_dims(triton_device: str, dim: int, turn_q: int):
    """Any multiple of 4: below the least tile, and with padding in either part."""
    grids = [(2, 9)]
    qkv = draw(grids, 3, dim, triton_device)
    assert max_error(run(qkv, grids, 3, turn_q=turn_q).cpu(), by_hand(qkv, grids, 3)) < FP32


@pytest.mark.parametrize("turn_q", [0, 1])
@pytest.mark.parametrize("grid", [(52, 52), (36, 36)])
def test_view_sizes(triton_device: str, grid: tuple[int, int], turn_q: int):
    """Both sizes of the model: 16 tokens more than whole blocks, in the last row tile and block."""
    qkv = draw([grid], 1, 16, triton_device)
    result = run(qkv, [grid], 1, rows=128, block=128, num_warps=8, turn_q=turn_q)
    assert max_error(result.cpu(), by_hand(qkv, [grid], 1)) < FP32


RAGGED = {
    "one token": [(1, 1)],
    "a line": [(1, 37)],
    "less than a block": [(3, 5)],
    "a block": [(4, 4)],
    "a block and one token": [(1, 17)],
    "several blocks": [(8, 6)],
    "odd": [(5, 7)],
    "one size, many views": [(3, 3)] * 7,
    "sizes mixed": [(5, 7), (1, 2), (6, 6), (5, 5), (7, 5), (1, 1)],
    "an empty view between others": [(3, 4), (0, 5), (2, 2)],
    "grids as lists": [[3, 4], [2, 2]],
}


@pytest.mark.parametrize("way", SPECIALIZED_LAST)
@pytest.mark.parametrize("grids", RAGGED.values(), ids=RAGGED.keys())
def test_ragged_batches(triton_device: str, grids: list, way: str):
    qkv = draw(grids, 2, 24, triton_device)
    result = run(qkv, grids, 2, **WAYS[way])
    assert max_error(result.cpu(), by_hand(qkv, grids, 2)) < FP32


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        ("turned queries", torch.float32),
        ("turned queries", torch.bfloat16),
        ("turned queries, tma", torch.float16),
    ],
    ids=("fp32", "bf16", "fp16, tma"),
)
@pytest.mark.parametrize("dim", [8, 24, 64, 72, 80, 96, 128])
def test_where_queries_are_rotated_does_not_matter(dim: int, way: str, dtype: torch.dtype):
    """Guards the rounding of rotated queries before their product: in either kernel, the same bits.

    A GPU may contract the two kernels' products and sums differently.
    """
    grids = [(3, 5), (4, 8), (1, 1), (1, 17)]
    qkv = draw(grids, 2, dim, "cpu", dtype)
    before = run(qkv, grids, 2, **WAYS[way] | {"turn_q": 0})
    assert torch.equal(run(qkv, grids, 2, **WAYS[way]), before)


@pytest.mark.parametrize("turn_q", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_sixteen_bits(triton_device: str, dtype: torch.dtype, turn_q: int):
    """Against eager, which rounds at the same points but for the probabilities."""
    grids = [(5, 7), (4, 4)]
    qkv = draw(grids, 2, 96, triton_device, dtype)
    expected = vision_attention(qkv, grids, heads=2, impl="eager")
    allowed = FP16 * torch.finfo(dtype).eps / torch.finfo(torch.float16).eps
    assert max_error(run(qkv, grids, 2, turn_q=turn_q), expected) < allowed


@pytest.mark.usefixtures("steady_products")
@pytest.mark.parametrize("way", [way for way in WAYS if way != "specialized"])
def test_neighbours_do_not_matter(triton_device: str, way: str):
    """A view's bits are the same alone and among others, be these NaN."""
    grids = [(3, 7), (4, 4), (2, 5)]
    qkv = draw(grids, 2, 24, triton_device)
    qkv[:21], qkv[37:] = float("nan"), float("nan")
    among = run(qkv, grids, 2, **WAYS[way])[21:37]
    assert torch.equal(among, run(qkv[21:37], [(4, 4)], 2, **WAYS[way]))
    assert among.isfinite().all()


@pytest.mark.parametrize("turn_q", [0, 1])
def test_heads_do_not_matter_to_each_other(triton_device: str, turn_q: int):
    """Heads of 24 are padded to 32, with what would be the next head's elements."""
    qkv = draw([(5, 7)], 3, 24, triton_device)
    expected = run(qkv, [(5, 7)], 3, turn_q=turn_q)[:, :48]
    qkv.view(35, 3, 3, 24)[:, :, 2] = float("nan")
    assert torch.equal(run(qkv, [(5, 7)], 3, turn_q=turn_q)[:, :48], expected)


def test_large_scores(triton_device: str):
    """Online softmax: a peak in the last block, scores far below 0 and far above."""
    qkv = draw([(5, 8)], 1, 16, triton_device) * 12
    qkv[-1, 16:32] *= 4
    assert max_error(run(qkv, [(5, 8)], 1).cpu(), by_hand(qkv, [(5, 8)], 1)) < FP32


def test_rows_may_stand_apart(triton_device: str):
    """qkv as columns of a wider tensor; columns that are not neighbours are refused."""
    wide = torch.full((35, 160), float("nan"), device=triton_device)
    qkv = wide[:, 7 : 7 + 144]
    qkv.copy_(draw([(5, 7)], 2, 24, triton_device))
    for way in ("pointers", "tma", "turned queries"):  # TMA falls back: 7 elements are not 16 bytes
        result = run(qkv, [(5, 7)], 2, **WAYS[way])
        assert max_error(result.cpu(), by_hand(qkv, [(5, 7)], 2)) < FP32
    with pytest.raises(ValueError, match="neighbouring columns"):
        run(qkv.T.contiguous().T, [(5, 7)], 2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "way",
    [
        {},
        {"tma": 1},
        {"turn_q": 1},
        pytest.param(
            {"tma": 1, "specialize": 1, "num_warps": 4},
            marks=pytest.mark.slow_gpu,
            id="specialized",
        ),
    ],
)
def test_real_shapes(way: dict):
    """A photo's views in the model's own shape, in the tiles of the GPU; twice the same bits."""
    grids = [(36, 36)] * 3 + [(52, 52)]
    qkv = draw(grids, 16, 96, "cuda", torch.bfloat16)
    expected = vision_attention(qkv.float(), grids, heads=16, impl="eager")
    with use_config("vision_attention", **way):
        result = vision_attention(qkv, grids, heads=16, impl="triton")
        again = vision_attention(qkv, grids, heads=16, impl="triton")
    assert torch.equal(result, again)
    assert max_error(result, expected) < 9 * 2**-9  # as bench/numerics.py allows


def test_theta(triton_device: str):
    qkv = draw([(5, 7)], 1, 16, triton_device)
    with use_config("vision_attention", **SMALL):
        result = vision_attention(qkv, [(5, 7)], heads=1, theta=100.0, impl="triton")
    assert max_error(result.cpu(), by_hand(qkv, [(5, 7)], 1, 100.0)) < FP32


def test_empty_batch(triton_device: str):
    assert run(torch.zeros(0, 144, device=triton_device), [], 2).shape == (0, 48)
    assert run(torch.zeros(0, 144, device=triton_device), [(0, 3)], 2).shape == (0, 48)


def test_mistakes_are_named(triton_device: str):
    with pytest.raises(ValueError, match="head_dim is at most 128 in Triton, not 132"):
        run(torch.zeros(4, 396, device=triton_device), [(2, 2)], 1)
    with pytest.raises(ValueError, match="fp32, bf16 or fp16, not torch.float64"):
        run(torch.zeros(4, 48, device=triton_device).double(), [(2, 2)], 1)
    with pytest.raises(ValueError, match="specialize and turn_q exclude each other"):
        run(torch.zeros(4, 48, device=triton_device), [(2, 2)], 1, tma=1, specialize=1, turn_q=1)
    with pytest.raises(ValueError, match="sides are below 32768"):
        none = torch.zeros(1, 4)
        launch(torch.zeros(32768, 48), [(1, 32768)], 1, none, none)


def test_parts_hold_every_head_dim():
    """Powers of two from 16 on, at least D together; 96 and 80 without an element to spare."""
    for dim in range(4, 129, 4):
        parts = Parts.of(dim)
        assert parts.padded >= dim and parts.first & (parts.first - 1) == 0 and parts.first >= 16
        assert parts.rest == 0 or (parts.rest & (parts.rest - 1) == 0 and parts.rest >= 16)
    found = {dim: tuple(Parts.of(dim)) for dim in (64, 72, 80, 96, 128)}
    assert found == {64: (64, 0), 72: (64, 16), 80: (64, 16), 96: (64, 32), 128: (128, 0)}


def test_tiles_cover_every_token_once():
    """Of each view, never across two; large views first."""
    grids = ((5, 7), (52, 52), (1, 1), (0, 4), (36, 36))
    places, work = _geometry(grids, 128, torch.device("cpu"))
    covered = torch.zeros(len(places), dtype=torch.int)
    for first, start, end in work.tolist():
        assert start <= first < end and (first - start) % 128 == 0
        covered[first : min(first + 128, end)] += 1
    assert covered.eq(1).all()
    lengths = (work[:, 2] - work[:, 1]).tolist()
    assert lengths == sorted(lengths, reverse=True)
    assert places[35 + 53].item() == (1 << 16) + 1


SPECIALIZED = """
import re
import torch
from kernels.compile.launches import compiler, launches_recorded
from kernels.runtime.configs import H200, use_config
from kernels.vision_attention import vision_attention
from kernels.vision_attention.launch import TUNABLE
qkv = torch.empty(30, 288, dtype=torch.bfloat16)
for tiles in TUNABLE.candidates("D96 T>4096", H200):
    if tiles["specialize"]:
        with launches_recorded(H200) as launches, use_config("vision_attention", **tiles):
            vision_attention(qkv, [(5, 6)], heads=1, impl="triton")
        with compiler(H200):
            asm = launches[1].compile().asm
        copies = [line for line in asm["ttgir"].splitlines() if "async_tma_copy" in line]
        both = r"(?:tensordesc<(?:tensor<)?|-> !ttg.memdesc<)(\\d+x\\d+)x"
        blocks = [re.findall(both, line) for line in copies]
        print("setmaxnreg" in asm["ptx"], len(copies), all(a == b for a, b in blocks))
"""


@pytest.mark.cli
def test_specialization_takes_place():
    """Triton gives up on it without a word: no warp group then hands registers to another.

    Nor does 3.6 say so when it halves Q's tile and not its descriptor, whose copies then write
    beyond their half and complete twice what their barrier expects: a hang.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SPECIALIZED], capture_output=True, text=True, env=environment
    )
    copies = 8  # of two parts: of Q's two halves, of K, of V
    assert done.stdout.splitlines() == [f"True {copies} True"] * 3, done.stderr


TURNED = """
import torch
from kernels.compile.launches import compiler, launches_recorded
from kernels.runtime.configs import H200, use_config
from kernels.vision_attention import vision_attention
from kernels.vision_attention.launch import TUNABLE
from profiles.static.sass import figures
qkv = torch.empty(1296, 4608, dtype=torch.bfloat16)
for tiles in TUNABLE.candidates("D96 T>4096", H200):
    if tiles["block"] == 64 and tiles["turn_q"]:
        with launches_recorded(H200) as launches, use_config("vision_attention", **tiles):
            vision_attention(qkv, [(36, 36)], heads=16, impl="triton")
        with compiler(H200):
            found = figures(launches[1].compile(), H200)
        print(found.programs_per_sm, found.wgmma)
"""


@pytest.mark.cli
def test_turned_queries_leave_room_for_a_second_program():
    """One program on an SM has nothing that computes while it exponentiates.

    Spills are the static baseline's to hold: they are a version of Triton's.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", TURNED], capture_output=True, text=True, env=environment
    )
    assert done.stdout.splitlines() == ["2 True"] * 3, done.stderr


def test_candidates_begin_with_the_rule():
    for gpu in (H200, A100):
        candidates = TUNABLE.candidates("D96 T>4096", gpu)
        assert candidates[0]["rows"] == 128 and not candidates[0]["specialize"]
        assert all(gpu.arch >= 90 or not (c["tma"] or c["turn_q"]) for c in candidates)
        assert any(c["turn_q"] for c in candidates) == (gpu.arch >= 90)
        assert not any(c["turn_q"] and (c is candidates[0] or c["specialize"]) for c in candidates)
