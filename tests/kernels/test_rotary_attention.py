"""rotary_attention: its fused form against qk_norm_rope and prefix_attention in eager PyTorch."""

import pytest
import torch

from bench.inputs.plans import prefix_plan
from bench.inputs.trees import Node, fork
from bench.suite.rotary_attention import inputs as rotary_attention_inputs
from kernels.errors import ImplError
from kernels.kv_pages import KVPages
from kernels.rotary_attention import rotary_attention
from kernels.runtime.configs import Gpu, assume_gpu, use_config
from tests.support.errors import max_error
from tests.support.prefix_trees import SWITCHES

PAGE = 16
FOREST = [fork(33, [1, 15, 16, 17, 40]), Node(3, new=1), fork(PAGE, [2])]
SMALL = [fork(5, [2])]  # for tests of which form runs
BF16 = pytest.param(torch.bfloat16, id="bf16")
# Limits of the output, and of pages relative to their largest value: in 16 bits 8 and 4 roundoffs.
LIMITS = {
    torch.float32: (4e-6, 1e-6),
    torch.float16: (2**-8, 2**-9),
    torch.bfloat16: (2**-5, 2**-6),
}


def step(
    device: str,
    forest: list[Node] = FOREST,
    dtype: torch.dtype = torch.float32,
    heads: int = 6,
    kv_heads: int = 2,
    dim: int = 16,
    fp8: bool = False,
) -> dict:
    """Inputs of a decode step whose new K and V are not yet in their pages: their slots are NaN."""
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "page_size": PAGE}
    return rotary_attention_inputs(0, device, dtype, forest=forest, fp8=fp8, **shape)


@pytest.fixture(autouse=True, params=["old", "new"])
def form(request):
    """Every test runs with all switches of the kernel off, and with all on."""
    switches = dict.fromkeys(SWITCHES, int(request.param == "new")) | {"pdl": 0}  # sm_80 has none
    with use_config("prefix_attention", **switches):
        yield


def run(inputs: dict, arch: int = 90, grain: int = 4, **options) -> tuple[torch.Tensor, KVPages]:
    """The output, and the pages and scales after the call; the pages of `inputs` do not change."""
    copies = inputs["pages"].map(torch.clone)
    gpu = Gpu("toy", arch, sms=5, shared_bytes=163 * 1024)
    with assume_gpu(gpu), use_config("prefix_attention", programs=1, grain=grain, overhead=1):
        return rotary_attention(**(inputs | {"pages": copies}), **options), copies


def check(inputs: dict, **options) -> None:
    """Compare output and pages with the two eager ops'; other slots must keep NaN."""
    expected, pages = run(inputs, impl="eager")
    out, written = run(inputs, impl="triton", **({"fused": True} | options))
    limit, page_limit = LIMITS[inputs["qkv"].dtype]
    assert max_error(out, expected) < limit
    for name, result, target in zip(pages._fields, written, pages, strict=True):
        if target is None:
            continue
        result, target = result.float(), target.float()
        assert torch.equal(result.isnan(), target.isnan()), name
        difference = (result - target).nan_to_num().abs().max()
        assert difference <= page_limit * target.nan_to_num().abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
def test_a_step(triton_device, dtype):
    """Guards leaves of one token, of whole pages, with a first token on a page; a lone sequence."""
    check(step(triton_device, dtype=dtype))


@pytest.mark.parametrize("fp8", [False, True])
def test_far_positions(triton_device, fp8):
    """Guards angles at the end of a context of a million tokens, where fp32 ones are wrong by 0.07.
    Positions need not agree with lengths here: nothing reads them but the rotation."""
    inputs = step(triton_device, SMALL, dtype=torch.float16 if fp8 else torch.float32, fp8=fp8)
    check(inputs | {"positions": inputs["positions"] + 2**20 - 9})


@pytest.mark.parametrize("grain", [1, 3, 64])
def test_owner_of_the_last_chunk(triton_device, grain):
    """Guards the program that writes the new token: its chunk is that token, more, or the whole
    leaf."""
    check(step(triton_device), grain=grain)


@pytest.mark.parametrize(
    ("dtype", "arch"),
    [
        (torch.float16, 80),
        (torch.float16, 90),
        (torch.float32, 90),
        pytest.param(torch.bfloat16, 80, id="bf16, sm_80"),
        pytest.param(torch.bfloat16, 90, id="bf16, sm_90"),
    ],
)
def test_fp8_pages(triton_device, dtype, arch):
    """Guards the new token: the step attends to it as later steps will read it, rounded to e4m3."""
    inputs = step(triton_device, dtype=dtype, fp8=True)
    if dtype == torch.float32:  # a roundoff in K may change its code: compare outputs
        expected, _ = run(inputs, impl="eager")
        out, _ = run(inputs, impl="triton", fused=True, arch=arch)
        assert max_error(out, expected) < 2**-6
    else:
        check(inputs, arch=arch)


def test_fp8_pages_of_small_values(triton_device):
    """Guards against underflow: weights times such small scales are 0 in fp16 unless the new
    token's weight is in the units of the blocks after it."""
    inputs = step(triton_device, fp8=True)
    inputs["qkv"][:, -2 * 16 :] *= 1e-4  # V of both heads
    inputs["pages"].v_scale.mul_(1e-4)
    expected, _ = run(inputs, impl="eager")
    out, _ = run(inputs, impl="triton", fused=True)
    assert max_error(out, expected) < 2**-6


def test_without_qk_norm(triton_device):
    """Guards models without qk-norm."""
    check(step(triton_device, SMALL) | {"q_weight": None, "k_weight": None})


def test_window(triton_device):
    """Guards sliding windows in the fused form."""
    check(step(triton_device) | {"window": 9})


def test_one_kv_head_of_64(triton_device):
    """Guards Step-3's shape: 64 query heads for one KV head."""
    check(step(triton_device, [fork(20, [3, 18])], heads=64, kv_heads=1, dim=32))


def test_slot_minus_one(triton_device):
    """Guards slot -1: it writes nothing, and the row still attends to its own token."""
    inputs = step(triton_device, [fork(20, [1, 17])])
    out, _ = run(inputs, impl="eager")
    nowhere = inputs | {"slots": torch.full_like(inputs["slots"], -1)}
    result, pages = run(nowhere, impl="triton", fused=True)
    assert max_error(result, out) < 4e-6
    for x, was in zip(pages[:2], inputs["pages"][:2], strict=True):
        assert torch.equal(x.nan_to_num(7.0), was.nan_to_num(7.0))


class TestWhichForm:
    """Fused is the default for decode steps, and is never used where it is impossible."""

    @pytest.fixture
    def two_ops(self, monkeypatch) -> list:
        calls = []
        real = rotary_attention.__globals__["qk_norm_rope"]

        def spy(*args, **kwargs):
            calls.append(kwargs["impl"])
            return real(*args, **kwargs)

        monkeypatch.setitem(rotary_attention.__globals__, "qk_norm_rope", spy)
        return calls

    def test_decode(self, triton_device, two_ops):
        """Guards the default of a decode step, and both ways to choose two ops instead."""
        inputs = step(triton_device, SMALL)
        run(inputs, impl="triton")
        assert not two_ops
        run(inputs, impl="triton", fused=False)
        with use_config("rotary_attention", fused=0):
            run(inputs, impl="triton")
        assert two_ops == ["triton", "triton"]

    def test_not_decode(self, triton_device, two_ops):
        """Guards several new tokens, partial rotation and mixed impls: two ops run, and
        `fused=True` is an error."""
        decode = step(triton_device, SMALL)
        partial = decode | {"frequencies": decode["frequencies"][:4].clone()}
        run(partial, impl="triton")
        run(decode, impl=("eager", "triton"))
        assert two_ops == ["triton", "eager"]
        several = decode | {"plan": prefix_plan(0, triton_device, forest=[Node(9, new=2)])}
        images = decode | {"positions": decode["positions"].expand(3, -1).contiguous()}
        for inputs, impl in (
            (several, "triton"),
            (partial, "triton"),
            (images, "triton"),
            (decode, "portable"),
            (decode, ("triton", "eager")),
        ):
            with pytest.raises(ValueError, match="fused: only"):
                run(inputs, impl=impl, fused=True)


@pytest.mark.parametrize("fused", [True, False])
def test_every_option_counts(triton_device, fused):
    """Guards scale, eps and window in both forms: none is dropped or passed as another."""
    inputs = step(triton_device, [fork(33, [15, 17])], heads=8)
    check(inputs | {"scale": 0.7, "eps": 0.5, "window": 21}, fused=fused)


def test_bad_input(triton_device):
    """Guards the checks: each mistake raises a ValueError that names the argument."""
    good = step(triton_device)
    pages = good["pages"]
    forests = {"rows": [fork(33, [1])], "pages": [fork(70, [1] * 7)]}
    other = {
        name: prefix_plan(0, triton_device, forest=forest, page_size=PAGE)
        for name, forest in forests.items()
    }
    other["page_size"] = prefix_plan(0, triton_device, forest=[*FOREST, Node(70)], page_size=32)
    assert other["page_size"].num_pages == pages.num_pages
    for name, value, message in (
        ("plan", other["rows"], "the plan is for 1 rows, not 7"),
        ("plan", other["pages"], f"the plan is for {other['pages'].num_pages} pages"),
        ("plan", other["page_size"], "the plan is for pages of 32 tokens"),
        ("qkv", torch.cat([good["qkv"]] * 2, 1)[:, : good["qkv"].shape[1]], "qkv must be contig"),
        ("qkv", good["qkv"].double(), "qkv must be"),
        ("qkv", torch.cat([good["qkv"]] * 2, 1)[:, ::2], "qkv must"),
        ("slots", good["slots"][:-1], "slots must be"),
        ("positions", good["positions"].float(), "positions must be"),
        ("pages", pages._replace(k=pages.k[:-1]), "pages.v must have the shape"),
        ("qkv", good["qkv"][:, : 9 * 16].contiguous(), "query heads must be a multiple of KV"),
        ("window", -1, "window must be"),
        ("q_weight", None, "give both q_weight and k_weight"),
        ("pages", pages._replace(k_scale=torch.ones(1)), "pages.k_scale goes with"),
    ):
        with pytest.raises(ValueError, match=message):
            run(good | {name: value}, impl="triton", fused=True)
    if triton_device == "cuda":
        cpu = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in good.items()}
        cpu["pages"] = pages.map(torch.Tensor.cpu)
        with pytest.raises(ImplError):
            run(cpu, impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
def test_real_shapes(fp8):
    """Guards the GPU's own configs: a token read before its owner has written it shows as NaN."""
    forest = [fork(2048, range(100, 116))]
    inputs = step("cuda", forest, torch.bfloat16, heads=32, kv_heads=8, dim=128, fp8=fp8)
    copies = {"pages": inputs["pages"].map(torch.clone)}
    expected = rotary_attention(**(inputs | copies), impl="eager")
    for _ in range(3):
        copies = {"pages": inputs["pages"].map(torch.clone)}
        out = rotary_attention(**(inputs | copies), impl="triton", fused=True)
        assert max_error(out, expected) < 2**-5
