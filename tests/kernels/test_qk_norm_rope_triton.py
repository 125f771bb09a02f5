"""qk_norm_rope: the Triton form, and all forms with FP8 pages and three rotation axes."""

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv_pages import KVPages
from kernels.qk_norm_rope import qk_norm_rope
from kernels.rotary_tables import rotary_frequencies
from kernels.runtime.configs import A100, assume_gpu, gpu_of, use_config
from kernels.runtime.fp8 import quantise_e4m3
from kernels.runtime.rotary import cos_sin
from tests.support.errors import max_error

PAGE = 4
# fp32: another order of sums, and another cos and sin. 16 bits: a value halfway between two may
# round to the other one after the norm, after the weight and after the rotation.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 3 * 2**-11, torch.bfloat16: 3 * 2**-8}
E4M3 = torch.float8_e4m3fn


def make(
    tokens: int = 5,
    heads: tuple[int, int] = (4, 2),
    dim: int = 16,
    rotary: int | None = None,
    norm: bool = True,
    dtype: torch.dtype = torch.float32,
    pages: torch.dtype | None = None,
    section: tuple[int, int, int] | None = None,
    device: str = "cpu",
) -> dict:
    """Inputs: pages hold NaN, the second token has slot -1, and positions reach 131072."""
    rotary = rotary or dim
    q_heads, kv_heads = heads
    weights = (torch.randn(2, dim) + 1).to(device, dtype) if norm else (None, None)
    num_pages = tokens // PAGE + 2
    slots = torch.randperm(num_pages * PAGE)[:tokens]
    slots[1:2] = -1
    axes = (3, tokens) if section else (tokens,)
    positions = torch.randint(131072, axes)
    positions[..., :1] = 131072
    shape = (num_pages, kv_heads, PAGE, dim)
    values = torch.full((2, *shape), math.nan).to(device, pages or dtype)
    scales = torch.full((2, *shape[:3]), -7.0, device=device) if pages == E4M3 else ()
    return {
        "qkv": torch.randn(tokens, (q_heads + 2 * kv_heads) * dim).to(device, dtype),
        "q_weight": weights[0],
        "k_weight": weights[1],
        "frequencies": rotary_frequencies(
            1e4 ** -(torch.arange(0, rotary, 2).double() / rotary)
        ).to(device),
        "positions": positions.to(device),
        "slots": slots.to(device),
        "pages": KVPages(*values, *scales),
        "mrope_section": section,
    }


def run(inputs: dict, impl: str) -> dict[str, Tensor]:
    """All results of a call on copies of the pages; the spare pages around them must not change."""

    def between_spares(x: Tensor) -> Tensor:
        spare = torch.full_like(x[:1], -9.0)
        return torch.cat([spare, x, spare])

    around = inputs["pages"].map(between_spares)
    written = around.map(lambda x: x[1:-1])
    q = qk_norm_rope(**(inputs | {"pages": written}), eps=1e-6, impl=impl)
    for x in around:
        assert x is None or (x[[0, -1]].float() == -9).all()
    return {"q": q} | {name: x for name, x in written._asdict().items() if x is not None}


def agree(inputs: dict, tolerance: float) -> None:
    """Check the Triton form's results, and which elements it leaves unwritten, against eager."""
    got, want = run(inputs, "triton"), run(inputs, "eager")
    for name, expected in want.items():
        assert got[name].dtype == expected.dtype
        untouched = expected.isnan()
        assert torch.equal(got[name].isnan(), untouched), name
        assert max_error(got[name][~untouched], expected[~untouched]) <= tolerance, name
        assert name == "q" or untouched.any()  # the token without a slot, and spare rows


@pytest.mark.parametrize(
    ("heads", "tokens"),
    [
        ((1, 1), 1),  # one of everything: tiles larger than the heads
        ((3, 1), 5),  # a tile of Q minus one
        ((4, 2), 2),  # whole tiles
        ((5, 3), 5),  # a tile plus one
        ((11, 7), 3),  # primes, several tiles of each
        ((4, 2), 0),  # no tokens
    ],
)
def test_heads(heads: tuple[int, int], tokens: int, triton_device: str):
    """Guards the tiles of heads: each head of Q, K and V is processed once, in its place."""
    with use_config("qk_norm_rope", block_q=4, block_kv=2):
        agree(make(tokens, heads, device=triton_device), 1e-6)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    ("dim", "rotary"),
    [
        (16, 16),
        (16, 8),  # half of the elements are not rotated
        (6, 2),  # no power of two: three pairs in a tile of four
        (96, 96),  # 48 pairs in a tile of 64
        (96, 32),  # adjacent elements stay adjacent across the rotation's end
        (64, 64),
        (128, 128),
        (256, 64),
    ],
)
def test_head_dims(dim: int, rotary: int, norm: bool, triton_device: str):
    """Guards the norm over a head's own elements; whole and partial rotation, with and without
    norm."""
    agree(make(3, (2, 1), dim, rotary, norm, device=triton_device), 1e-6)


@pytest.mark.parametrize("tokens", [3, 65])
def test_default_configs(tokens: int, triton_device: str):
    """Guards the rule's configs for few and many tokens, with heads that do not fill them."""
    agree(make(tokens, (1, 1), 8, device=triton_device), 1e-6)


@pytest.mark.parametrize(
    ("dtype", "pages"),
    [
        (torch.float16, None),
        (torch.float16, torch.float32),
        (torch.float32, torch.float16),
        pytest.param(torch.bfloat16, None, id="bf16"),
        pytest.param(torch.bfloat16, torch.float32, id="bf16, fp32 pages"),
        pytest.param(torch.float32, torch.bfloat16, id="bf16 pages"),
    ],
)
def test_rounding(dtype: torch.dtype, pages: torch.dtype | None, triton_device: str):
    """Guards the rounding points: nearly all values have the same bits, and none is far off."""
    inputs = make(7, dim=128, dtype=dtype, pages=pages, device=triton_device)
    coarsest = max((dtype, pages or dtype), key=TOLERANCES.get)
    agree(inputs, TOLERANCES[coarsest])
    if dtype != torch.float32:
        got, want = run(inputs, "triton")["q"], run(inputs, "eager")["q"]
        assert (got != want).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, id="bf16")])
def test_v_is_copied(dtype: torch.dtype, triton_device: str):
    """Guards V bit by bit, including values that another 16-bit dtype could not hold."""
    inputs = make(5, dtype=dtype, device=triton_device)
    inputs["qkv"][:, -2 * 16 :] *= torch.finfo(dtype).max / 8
    got, want = run(inputs, "triton"), run(inputs, "eager")
    assert torch.equal(got["v"].view(torch.int16), want["v"].view(torch.int16))


def test_layouts(triton_device: str):
    """Guards bits: rows of a wider tensor, 32-bit indices and a row alone change none."""
    inputs = make(5, device=triton_device)
    want = run(inputs, "triton")
    wide = torch.cat((inputs["qkv"], inputs["qkv"]), dim=1)
    small = {name: inputs[name].int() for name in ("positions", "slots")}
    got = run(inputs | {"qkv": wide[:, : inputs["qkv"].shape[1]]} | small, "triton")
    for name in want:
        assert torch.equal(got[name].nan_to_num(9), want[name].nan_to_num(9))
    for t in range(5):
        row = {name: inputs[name][t : t + 1] for name in ("qkv", "positions", "slots")}
        assert torch.equal(run(inputs | row, "triton")["q"][0], want["q"][t])


@pytest.mark.parametrize("gpu", ["any", pytest.param("this", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, id="bf16")]
)
def test_fp8_pages(gpu: str, dtype: torch.dtype, triton_device: str):
    """Guards quantisation, with and without the GPU's conversion: V is exact, K may differ by one
    code where a value is halfway between two."""
    inputs = make(5, (5, 3), 32, dtype=dtype, pages=E4M3, device=triton_device)
    inputs["qkv"][2, -32:] = 0  # gives the smallest scale
    assumed = A100 if gpu == "any" else gpu_of(torch.device(triton_device))
    with assume_gpu(assumed), use_config("qk_norm_rope", block_q=4, block_kv=2):
        got = run(inputs, "triton")
    want = run(inputs, "eager")
    for name in ("v", "v_scale"):
        assert torch.equal(got[name].view(torch.uint8), want[name].view(torch.uint8))
    assert max_error(got["k_scale"], want["k_scale"]) <= TOLERANCES[dtype]
    codes = [x["k"].view(torch.uint8).int() for x in (got, want)]
    off = (codes[0] - codes[1]).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 0.01


@pytest.mark.parametrize("impl", ["eager", "portable"])
def test_fp8_definition(impl: str):
    """Guards the definition: FP8 pages and scales are the quantised values of unquantised pages."""
    inputs = make(5, pages=E4M3)
    plain = KVPages(inputs["pages"].k.float(), inputs["pages"].v.float())
    got = run(inputs, impl)
    want = run(inputs | {"pages": plain}, impl)
    assert torch.equal(got["q"], want["q"])
    for kind in ("k", "v"):
        page, scale = quantise_e4m3(want[kind])
        untouched = scale.isnan()
        assert untouched.any() and (got[f"{kind}_scale"][untouched] == -7).all()
        assert torch.equal(got[f"{kind}_scale"][~untouched], scale[~untouched])
        assert torch.equal(got[kind].view(torch.uint8), page.view(torch.uint8))


@pytest.mark.filterwarnings("ignore:invalid value")  # from NumPy: inf * 0 in the interpreter
def test_fp8_non_finite(triton_device: str):
    """Guards the neighbours of NaN and inf: only that token's values in that head become NaN."""
    inputs = make(3, pages=E4M3, norm=False, device=triton_device)
    inputs["slots"] = torch.tensor([0, 1, 2], device=triton_device)
    inputs["qkv"][0, -1], inputs["qkv"][1, -1] = math.nan, math.inf
    got = run(inputs, "triton")
    value = got["v"].float() * got["v_scale"][..., None]
    assert value[0, 1, :2].isnan().all()
    assert value[0, 0, :3].isfinite().all() and value[0, 1, 2].isfinite().all()


@pytest.mark.judge
@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize(
    ("dim", "section"), [(128, (24, 20, 20)), (16, (4, 2, 2)), (12, (6, 0, 0))]
)
def test_three_axes_as_transformers(impl: str, dim: int, section: tuple, triton_device: str):
    """Guards which axis each frequency takes, with transformers' Qwen3-VL as the judge."""
    from transformers import Qwen3VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    inputs = make(5, dim=dim, norm=False, section=section, device=triton_device)
    inputs["positions"] %= 1000  # the judge rounds cos and sin differently
    config = Qwen3VLTextConfig(
        head_dim=dim,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": list(section),
            "mrope_interleaved": True,
        },
    )
    judge = Qwen3VLTextRotaryEmbedding(config)
    judge.inv_freq = judge.inv_freq.bfloat16().float()  # its fp32 angles are then exact
    cos, sin = judge(torch.zeros(()), inputs["positions"][:, None].cpu())
    inputs["frequencies"] = rotary_frequencies(judge.inv_freq).to(triton_device)
    q = inputs["qkv"].cpu().view(5, -1, dim)[:, :4]
    rotated = torch.cat((-q[..., dim // 2 :], q[..., : dim // 2]), dim=-1)
    want = q * cos[0][:, None] + rotated * sin[0][:, None]
    assert max_error(run(inputs, impl)["q"].cpu(), want) < 1e-6


@pytest.mark.parametrize("fp8", [False, True])
def test_three_axes(fp8: bool, triton_device: str):
    """Guards K, which takes the same axes as Q, in plain and FP8 pages, with partial rotation."""
    inputs = make(5, dim=32, rotary=24, section=(5, 4, 3), device=triton_device)
    agree(inputs, 1e-6)
    if fp8:
        k = run(inputs, "triton")["k"].nan_to_num(0)
        quantised = make(5, dim=32, rotary=24, section=(5, 4, 3), pages=E4M3, device=triton_device)
        got = run(quantised | {n: x for n, x in inputs.items() if n != "pages"}, "triton")
        value = got["k"].float() * got["k_scale"][..., None]
        assert max_error(value.nan_to_num(0), k) < 2**-3


@triton.jit
def cos_sin_kernel(positions, frequencies, out, n, BLOCK: tl.constexpr, PAIRS: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(positions + at, mask=at < n, other=0)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    cos, sin = cos_sin(position, tl.load(frequencies + pair))
    target = out + at[:, None] * PAIRS + pair
    tl.store(target, cos, mask=(at < n)[:, None])
    tl.store(target + n * PAIRS, sin, mask=(at < n)[:, None])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("theta", "dim"), [(1e6, 128), (1e4, 64)])
def test_cos_sin(theta: float, dim: int, dtype: torch.dtype, triton_device: str):
    """Guards the kernel's cos and sin: within 2^-23 of fp64 up to position 2^20 and at the far end
    of int32; a GPU tries every position."""
    inv_freq = theta ** -(torch.arange(0, dim, 2).double() / dim)
    positions = torch.arange(0, 2**20, 1 if triton_device == "cuda" else 487)
    far = torch.tensor([2**20 - 1, 2**20, 2**24, 2**31 - 1])
    positions = torch.cat((positions, far)).to(triton_device, dtype)
    got = torch.full((2, len(positions), dim // 2), math.nan, device=triton_device)
    block = 1 << 8
    cos_sin_kernel[(triton.cdiv(len(positions), block),)](
        positions,
        rotary_frequencies(inv_freq).to(triton_device),
        got,
        len(positions),
        BLOCK=block,
        PAIRS=dim // 2,
    )
    angle = positions.double()[:, None] * inv_freq.to(triton_device)
    want = torch.stack((angle.cos(), angle.sin()))
    limit = 2.0**-23 + 2.0**-52 * angle.abs()  # the judge's own error
    assert ((got.double() - want).abs() < limit).all()


def test_bad_arguments_are_named(triton_device: str):
    """Guards the checks before a launch: inputs that would be misread are refused."""
    good = make(5, device=triton_device)
    pages = good["pages"]
    fp8 = make(5, pages=E4M3, device=triton_device)["pages"]
    three = make(5, section=(4, 2, 2), device=triton_device)
    cases = [
        (good | {"qkv": good["qkv"].double()}, "qkv must be fp32"),
        (good | {"qkv": good["qkv"].T.contiguous().T}, "qkv must have neighbouring columns"),
        (good | {"q_weight": good["q_weight"].half()}, "q_weight must be torch.float32"),
        (good | {"k_weight": good["k_weight"].repeat_interleave(2)[::2]}, "k_weight .* contiguous"),
        (good | {"frequencies": good["frequencies"].double()}, "frequencies must be int64"),
        (good | {"positions": good["positions"].float()}, "positions must be torch.int32 or"),
        (good | {"slots": good["slots"].to("meta")}, "slots must be on"),
        (good | {"slots": good["slots"].repeat_interleave(2)[::2]}, "slots must be contiguous"),
        (three | {"mrope_section": (4, 2, 1)}, "mrope_section must add up to R/2"),
        (three | {"mrope_section": None}, r"positions must be \[5\]"),
        (good | {"mrope_section": (4, 2, 2)}, r"positions must be \[3, 5\]"),
        (make(5, dim=5, rotary=4, device=triton_device), "even head_dim"),
    ]
    wrong_pages = [
        (pages._replace(k=pages.k.mT.contiguous().mT), "pages.k must be contiguous"),
        (pages._replace(v=pages.v.half()), "pages.v must have the dtype of pages.k"),
        (pages.map(Tensor.double), "pages must be fp32, bf16, fp16 or e4m3"),
        (pages._replace(k_scale=fp8.k_scale), "pages.k_scale goes with pages of float8_e4m3fn"),
        (fp8._replace(v_scale=None), "pages.v_scale goes with pages of float8_e4m3fn"),
        (fp8._replace(k_scale=fp8.k_scale.half()), "pages.k_scale must be fp32"),
        (fp8._replace(k_scale=fp8.k_scale[1:]), "pages.k_scale must be fp32"),
        (
            fp8._replace(v_scale=fp8.v_scale.mT.contiguous().mT),
            "pages.v_scale must be contiguous",
        ),
        (pages._replace(v=pages.v.to("meta")), "pages.v must be on"),
    ]
    cases += [(good | {"pages": wrong}, message) for wrong, message in wrong_pages]
    for inputs, message in cases:
        with pytest.raises(ValueError, match=message):
            qk_norm_rope(**inputs, impl="triton")
