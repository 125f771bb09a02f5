"""The Triton form of vision attention: views of all shapes, every head_dim, every kernel config.

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
FP32, FP16 = 6e-6, 2**-9  # FP16: roundoffs of a rotated key and of a probability
SMALL = {"rows": 16, "block": 16, "num_warps": 4}
CONFIGS = {
    "pointers": {},
    "short last tiles": {"rows": 32, "block": 32},
    "tma": {"tma": 1, "rows": 32, "block": 32},
    "turned queries": {"turn_q": 1, "rows": 32, "block": 32},
    "turned queries, tma": {"turn_q": 1, "tma": 1, "rows": 32},
    "specialized": {"tma": 1, "specialize": 1},
}
SPECIALIZED_LAST = [
    pytest.param(config, marks=pytest.mark.slow_gpu if config == "specialized" else ())
    for config in CONFIGS
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


def run(qkv: Tensor, grids: list, heads: int, **config: int) -> Tensor:
    with use_config("vision_attention", **SMALL | config):
        return vision_attention(qkv, grids, heads=heads, impl="triton")


def by_hand(qkv: Tensor, grids: list, heads: int, theta: float = 1e4) -> Tensor:
    """In fp64: pairs as complex numbers times exp(i angle), view by view and head by head."""
    dim = qkv.shape[1] // (3 * heads)
    frequencies = theta ** (-2 * torch.arange(dim // 4).double() / (dim // 2))
    outs, start = [], 0
    for rows, columns in grids:
        token = torch.arange(rows * columns)
        angles = [(x[:, None] * frequencies) for x in (token % columns, token // columns)]
        angle = torch.cat(angles, dim=1)
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


@pytest.mark.parametrize("config", SPECIALIZED_LAST)
@pytest.mark.parametrize("dim", [64, 72, 80, 96, 128])
def test_head_dims(triton_device: str, dim: int, config: str):
    """Guards heads of one part, of two, and with padding in the second, over ragged views."""
    grids = [(3, 5), (4, 8), (1, 1)]
    qkv = draw(grids, 2, dim, triton_device)
    result = run(qkv, grids, 2, **CONFIGS[config])
    assert max_error(result.cpu(), by_hand(qkv, grids, 2)) < FP32


@pytest.mark.parametrize("turn_q", [0, 1])
@pytest.mark.parametrize("dim", [4, 16, 20, 36, 100])
def test_other_head_dims(triton_device: str, dim: int, turn_q: int):
    """Guards every multiple of 4: below the smallest tile, and with padding in either part."""
    grids = [(2, 9)]
    qkv = draw(grids, 3, dim, triton_device)
    assert max_error(run(qkv, grids, 3, turn_q=turn_q).cpu(), by_hand(qkv, grids, 3)) < FP32


@pytest.mark.parametrize("turn_q", [0, 1])
@pytest.mark.parametrize("grid", [(52, 52), (36, 36)])
def test_view_sizes(triton_device: str, grid: tuple[int, int], turn_q: int):
    """Guards the model's view sizes, which leave 16 tokens for the last row tile and block."""
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


@pytest.mark.parametrize("config", SPECIALIZED_LAST)
@pytest.mark.parametrize("grids", RAGGED.values(), ids=RAGGED.keys())
def test_ragged_batches(triton_device: str, grids: list, config: str):
    """Guards views of all sizes in one batch: none may read another's tokens."""
    qkv = draw(grids, 2, 24, triton_device)
    result = run(qkv, grids, 2, **CONFIGS[config])
    assert max_error(result.cpu(), by_hand(qkv, grids, 2)) < FP32


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ("turned queries", torch.float32),
        ("turned queries", torch.bfloat16),
        ("turned queries, tma", torch.float16),
    ],
    ids=("fp32", "bf16", "fp16, tma"),
)
@pytest.mark.parametrize("dim", [8, 24, 64, 72, 80, 96, 128])
def test_where_queries_are_rotated_does_not_matter(dim: int, config: str, dtype: torch.dtype):
    """Guards the rounding of rotated queries before their product: the same bits in either kernel.

    On a GPU the compiler may contract products and sums of the two kernels differently.
    """
    grids = [(3, 5), (4, 8), (1, 1), (1, 17)]
    qkv = draw(grids, 2, dim, "cpu", dtype)
    before = run(qkv, grids, 2, **CONFIGS[config] | {"turn_q": 0})
    assert torch.equal(run(qkv, grids, 2, **CONFIGS[config]), before)


@pytest.mark.parametrize("turn_q", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_sixteen_bits(triton_device: str, dtype: torch.dtype, turn_q: int):
    """Guards the rounding points: all are eager's, except for the probabilities."""
    grids = [(5, 7), (4, 4)]
    qkv = draw(grids, 2, 96, triton_device, dtype)
    expected = vision_attention(qkv, grids, heads=2, impl="eager")
    allowed = FP16 * torch.finfo(dtype).eps / torch.finfo(torch.float16).eps
    assert max_error(run(qkv, grids, 2, turn_q=turn_q), expected) < allowed


@pytest.mark.usefixtures("steady_products")
@pytest.mark.parametrize("config", [config for config in CONFIGS if config != "specialized"])
def test_neighbours_do_not_matter(triton_device: str, config: str):
    """Guards a view's bits: the same alone and among others, even if those are NaN."""
    grids = [(3, 7), (4, 4), (2, 5)]
    qkv = draw(grids, 2, 24, triton_device)
    qkv[:21], qkv[37:] = float("nan"), float("nan")
    among = run(qkv, grids, 2, **CONFIGS[config])[21:37]
    assert torch.equal(among, run(qkv[21:37], [(4, 4)], 2, **CONFIGS[config]))
    assert among.isfinite().all()


@pytest.mark.parametrize("turn_q", [0, 1])
def test_heads_do_not_matter_to_each_other(triton_device: str, turn_q: int):
    """Guards the padding of heads of 24 to 32, which in memory are the next head's elements."""
    qkv = draw([(5, 7)], 3, 24, triton_device)
    expected = run(qkv, [(5, 7)], 3, turn_q=turn_q)[:, :48]
    qkv.view(35, 3, 3, 24)[:, :, 2] = float("nan")
    assert torch.equal(run(qkv, [(5, 7)], 3, turn_q=turn_q)[:, :48], expected)


def test_large_scores(triton_device: str):
    """Guards the online softmax: a peak in the last block, and scores far below and above 0."""
    qkv = draw([(5, 8)], 1, 16, triton_device) * 12
    qkv[-1, 16:32] *= 4
    assert max_error(run(qkv, [(5, 8)], 1).cpu(), by_hand(qkv, [(5, 8)], 1)) < FP32


def test_rows_may_be_strided(triton_device: str):
    """Guards qkv as columns of a wider tensor; columns with a stride are refused."""
    wide = torch.full((35, 160), float("nan"), device=triton_device)
    qkv = wide[:, 7 : 7 + 144]
    qkv.copy_(draw([(5, 7)], 2, 24, triton_device))
    # TMA falls back to pointers: 7 elements are not 16 bytes.
    for config in ("pointers", "tma", "turned queries"):
        result = run(qkv, [(5, 7)], 2, **CONFIGS[config])
        assert max_error(result.cpu(), by_hand(qkv, [(5, 7)], 2)) < FP32
    with pytest.raises(ValueError, match="neighbouring columns"):
        run(qkv.T.contiguous().T, [(5, 7)], 2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
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
def test_real_shapes(config: dict):
    """Guards a photo's views at the model's shape with the GPU's configs: right, reproducible."""
    grids = [(36, 36)] * 3 + [(52, 52)]
    qkv = draw(grids, 16, 96, "cuda", torch.bfloat16)
    expected = vision_attention(qkv.float(), grids, heads=16, impl="eager")
    with use_config("vision_attention", **config):
        result = vision_attention(qkv, grids, heads=16, impl="triton")
        again = vision_attention(qkv, grids, heads=16, impl="triton")
    assert torch.equal(result, again)
    assert max_error(result, expected) < 9 * 2**-9  # as bench/suite/vision_attention.py allows


def test_theta(triton_device: str):
    """Guards the rotation base `theta`."""
    qkv = draw([(5, 7)], 1, 16, triton_device)
    with use_config("vision_attention", **SMALL):
        result = vision_attention(qkv, [(5, 7)], heads=1, theta=100.0, impl="triton")
    assert max_error(result.cpu(), by_hand(qkv, [(5, 7)], 1, 100.0)) < FP32


def test_empty_batch(triton_device: str):
    """Guards batches without views, and views without tokens."""
    assert run(torch.zeros(0, 144, device=triton_device), [], 2).shape == (0, 48)
    assert run(torch.zeros(0, 144, device=triton_device), [(0, 3)], 2).shape == (0, 48)


def test_mistakes_are_named(triton_device: str):
    """Guards the checks: each mistake raises a ValueError that names the argument."""
    with pytest.raises(ValueError, match="head_dim must be at most 128 in Triton, not 132"):
        run(torch.zeros(4, 396, device=triton_device), [(2, 2)], 1)
    with pytest.raises(ValueError, match="fp32, bf16 or fp16, not torch.float64"):
        run(torch.zeros(4, 48, device=triton_device).double(), [(2, 2)], 1)
    with pytest.raises(ValueError, match="specialize and turn_q exclude each other"):
        run(torch.zeros(4, 48, device=triton_device), [(2, 2)], 1, tma=1, specialize=1, turn_q=1)
    with pytest.raises(ValueError, match="sides must be below 32768"):
        none = torch.zeros(1, 4)
        launch(torch.zeros(32768, 48), [(1, 32768)], 1, none, none)


def test_parts_hold_every_head_dim():
    """Guards the parts of a head: powers of two from 16 on, at least D; 80 and 96 without
    padding."""
    for dim in range(4, 129, 4):
        parts = Parts.of(dim)
        assert parts.padded >= dim and parts.first & (parts.first - 1) == 0 and parts.first >= 16
        assert parts.rest == 0 or (parts.rest & (parts.rest - 1) == 0 and parts.rest >= 16)
    parts_of = {dim: tuple(Parts.of(dim)) for dim in (64, 72, 80, 96, 128)}
    assert parts_of == {64: (64, 0), 72: (64, 16), 80: (64, 16), 96: (64, 32), 128: (128, 0)}


def test_tiles_cover_every_token_once():
    """Guards the tiles: each is within one view, and those of large views come first."""
    grids = ((5, 7), (52, 52), (1, 1), (0, 4), (36, 36))
    positions, work = _geometry(grids, 128, torch.device("cpu"))
    covered = torch.zeros(len(positions), dtype=torch.int)
    for first, start, end in work.tolist():
        assert start <= first < end and (first - start) % 128 == 0
        covered[first : min(first + 128, end)] += 1
    assert covered.eq(1).all()
    lengths = (work[:, 2] - work[:, 1]).tolist()
    assert lengths == sorted(lengths, reverse=True)
    assert positions[35 + 53].item() == (1 << 16) + 1


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
def test_warp_specialization_is_applied():
    """Guards against Triton silently dropping warp specialisation: no warp group then gives up
    registers.

    Nor does 3.6 report that it halves Q's tile but not its descriptor: the copies then write beyond
    their half and complete twice what their barrier expects, which hangs.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SPECIALIZED], capture_output=True, text=True, env=environment
    )
    copies = 8  # two parts each of Q's two halves, of K and of V
    assert done.stdout.splitlines() == [f"True {copies} True"] * 3, done.stderr


TURNED = """
import torch
from kernels.compile.launches import compiler, launches_recorded
from kernels.runtime.configs import H200, use_config
from kernels.vision_attention import vision_attention
from kernels.vision_attention.launch import TUNABLE
from profiles.static.sass import kernel_stats
qkv = torch.empty(1296, 4608, dtype=torch.bfloat16)
for tiles in TUNABLE.candidates("D96 T>4096", H200):
    if tiles["block"] == 64 and tiles["turn_q"]:
        with launches_recorded(H200) as launches, use_config("vision_attention", **tiles):
            vision_attention(qkv, [(36, 36)], heads=16, impl="triton")
        with compiler(H200):
            found = kernel_stats(launches[1].compile(), H200)
        print(found.programs_per_sm, found.wgmma)
"""


@pytest.mark.cli
def test_turned_queries_leave_room_for_a_second_program():
    """Guards two programs per SM with `turn_q`: with one, nothing computes during its exponentials.

    Spills depend on Triton's version, so the static baseline checks them.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", TURNED], capture_output=True, text=True, env=environment
    )
    assert done.stdout.splitlines() == ["2 True"] * 3, done.stderr


def test_candidates_begin_with_the_rule():
    """Guards tuning: the rule's config comes first, and no candidate is impossible on its GPU."""
    for gpu in (H200, A100):
        candidates = TUNABLE.candidates("D96 T>4096", gpu)
        assert candidates[0]["rows"] == 128 and not candidates[0]["specialize"]
        assert all(gpu.arch >= 90 or not (c["tma"] or c["turn_q"]) for c in candidates)
        assert any(c["turn_q"] for c in candidates) == (gpu.arch >= 90)
        assert not any(c["turn_q"] and (c is candidates[0] or c["specialize"]) for c in candidates)
