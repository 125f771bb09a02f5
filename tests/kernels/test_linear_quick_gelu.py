"""linear_quick_gelu against fp64, and its fused and separate Triton forms against each other."""

import pytest
import torch
from torch import Tensor

from kernels.linear_quick_gelu import linear_quick_gelu
from kernels.runtime.configs import A100, H200, Gpu, assume_gpu, record_configs, use_config
from tests.support.errors import max_error

FORMS = [
    ("eager", None),
    ("portable", None),
    ("triton", None),
    ("triton", False),
    ("triton", True),
]
BF16 = pytest.param(torch.bfloat16, id="bf16")
# 16 bits: the linear layer's rounding, which the activation's slope multiplies by up to 1.1, and
# the activation's own rounding; more where the activation is much smaller than its argument.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 3 * 2**-11, torch.bfloat16: 3 * 2**-8}
TILES = {"block_m": 16, "block_n": 16, "block_k": 16, "overhead": 0, "programs": 1}


@pytest.fixture(autouse=True)
def small_tiles():
    """Small tiles, split among five SMs; unwritten elements are NaN."""
    torch.use_deterministic_algorithms(True)
    with assume_gpu(Gpu("toy", 90, 5, 227 * 1024)), use_config("gemm", **TILES):
        yield
    torch.use_deterministic_algorithms(False)


def draw(rows: int, channels: int, width: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    x, bias = torch.randn(rows, channels), torch.randn(width)
    weight = 2 * torch.randn(width, channels) / channels**0.5
    return [tensor.to(device, dtype) for tensor in (x, weight, bias)]


@pytest.mark.parametrize("impl,fused", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize(
    # One row, and one column, with three results each: a single one might be where the activation
    # is close to 0, so that 16 bits have no relative precision.
    "shape",
    [(1, 1, 3), (3, 1, 1), (16, 16, 16), (17, 31, 15), (37, 130, 53), (3, 96, 8)],
)
def test_against_fp64(
    shape: tuple, dtype: torch.dtype, impl: str, fused: bool | None, triton_device: str
):
    """Guards the formula in every form, for shapes that fill no tile."""
    x, weight, bias = draw(*shape, dtype, triton_device)
    out = linear_quick_gelu(x, weight, bias, fused=fused, impl=impl)
    z = x.double() @ weight.double().T + bias.double()
    assert out.dtype == dtype
    assert max_error(out, z * torch.sigmoid(1.702 * z)) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_rounds_before_the_activation(dtype: torch.dtype, triton_device: str):
    """Guards the fused form's rounding point: results differ from eager only where sums do."""
    x, weight, bias = draw(64, 8, 64, dtype, triton_device)
    want = linear_quick_gelu(x, weight, bias, impl="eager")
    z = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    once = (z * torch.sigmoid(1.702 * z)).to(dtype)
    got = linear_quick_gelu(x, weight, bias, fused=True, impl="triton")
    assert (got != want).float().mean() < 0.01 < (once != want).float().mean()


def test_default_form(triton_device: str):
    """Guards `fused=None`: the kernel config decides, and by the rule the form is not fused."""
    x, weight, bias = draw(17, 48, 31, torch.float16, triton_device)
    for config, ops in [
        ({"fused": 1}, {"linear_quick_gelu", "gemm"}),
        ({"fused": 0}, {"linear_quick_gelu", "quick_gelu"}),
        ({}, {"linear_quick_gelu", "quick_gelu"}),
    ]:
        with use_config("linear_quick_gelu", **config), record_configs() as configs:
            linear_quick_gelu(x, weight, bias, impl="triton")
        assert {op for op, _ in configs} == ops


@pytest.mark.parametrize("impl,fused", FORMS)
def test_no_rows(impl: str, fused: bool | None, triton_device: str):
    """Guards an empty batch."""
    x, weight, bias = draw(0, 48, 31, torch.float32, triton_device)
    assert linear_quick_gelu(x, weight, bias, fused=fused, impl=impl).shape == (0, 31)


@pytest.mark.parametrize("impl,fused", FORMS)
def test_mistakes_are_named(impl: str, fused: bool | None, triton_device: str):
    """Guards the checks in every form: each mistake raises a ValueError that names the argument."""
    x, weight, bias = draw(3, 48, 31, torch.float32, triton_device)
    cases = [
        (r"x must be \[T, C\]", (x[0], weight, bias)),
        ("x must be fp32, bf16 or fp16", (x.double(), weight, bias)),
        (r"weight must be \[F, 48\]", (x, weight[:, 1:], bias)),
        (r"bias must be \[31\]", (x, weight, bias[1:])),
        ("weight must be torch.float16", (x.half(), weight, bias)),
        ("bias must be torch.float32", (x, weight, bias.half())),
    ]
    for message, args in cases:
        with pytest.raises(ValueError, match=message):
            linear_quick_gelu(*args, fused=fused, impl=impl)


@pytest.mark.parametrize(
    "gpu,buffers", [(H200, 4), (A100, 3), (Gpu("small", 86, 84, 99 * 1024), 2)]
)
def test_stages_fit_in_shared_memory(gpu: Gpu, buffers: int, triton_device: str):
    """Guards `num_stages` of the rule's tiles of 128 x 256 for this size; the test runs smaller
    tiles.

    Before sm_90 the compiler allocates one buffer fewer than there are stages.
    """
    inputs = draw(65, 16, 129, torch.float16, triton_device)
    with assume_gpu(gpu), record_configs() as configs:
        linear_quick_gelu(*inputs, fused=True, impl="triton")
    (config,) = (config for (op, _), config in configs.items() if op == "gemm")
    assert config["num_stages"] - (gpu.arch < 90) == buffers
    assert buffers * 2 * 64 * (128 + 256) <= gpu.shared_bytes
