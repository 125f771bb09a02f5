"""qk_norm_rope against a complex rotation in fp64, and the slots that it must not write."""

import math

import pytest
import torch
from torch import Tensor

from kernels.kv_pages import KVPages
from kernels.qk_norm_rope import qk_norm_rope
from kernels.rotary_tables import rotary_frequencies
from tests.support.errors import max_error

HEADS, KV_HEADS, PAGE = 4, 2, 4


def run(
    dim: int = 16, rotary: int = 16, norm: bool = True, slots: tuple[int, ...] = (9, 2, 15)
) -> dict:
    """One call on random inputs: them and `q`. Pages hold NaN before it."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, dim, generator=generator) + 1 if norm else (None, None)
    pages = KVPages(*torch.full((2, 5, KV_HEADS, PAGE, dim), math.nan))
    inputs = {
        "qkv": torch.randn(len(slots), (HEADS + 2 * KV_HEADS) * dim, generator=generator),
        "q_weight": weights[0],
        "k_weight": weights[1],
        "frequencies": rotary_frequencies(1e4 ** -(torch.arange(0, rotary, 2).double() / rotary)),
        "positions": torch.tensor([0, 7, 2**20][: len(slots)]),
        "slots": torch.tensor(slots, dtype=torch.long),
        "pages": pages,
    }
    return inputs | {"q": qk_norm_rope(**inputs, eps=1e-6)}


def expected_heads(x: Tensor, weight: Tensor | None, rotary: int, positions: Tensor) -> Tensor:
    """[T, heads, D], normalised and rotated as complex numbers, in fp64."""
    x = x.double()
    if weight is not None:
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    half = rotary // 2
    inv_freq = 1e4 ** -(torch.arange(0, rotary, 2).double() / rotary)
    angle = (positions[:, None] * inv_freq)[:, None]
    rotated = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.cat([rotated.real, rotated.imag, x[..., 2 * half :]], dim=-1)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("dim", "rotary"), [(16, 16), (16, 8), (6, 2), (128, 128)])
def test_values(dim: int, rotary: int, norm: bool):
    """Guards the norm, whole and partial rotation, far positions; K is rotated, V is copied."""
    got = run(dim, rotary, norm)
    heads = got["qkv"].view(3, -1, dim).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    q, k = (
        expected_heads(x, weight, rotary, got["positions"])
        for x, weight in zip(heads, (got["q_weight"], got["k_weight"]), strict=False)
    )
    assert max_error(got["q"], q) < 1e-6
    for row, slot in enumerate(got["slots"].tolist()):
        page, offset = divmod(slot, PAGE)
        assert max_error(got["pages"].k[page, :, offset], k[row]) < 1e-6
        assert torch.equal(got["pages"].v[page, :, offset], heads[2][row])


def test_only_its_slots_are_written():
    """Guards other tokens' KV, and slot -1 (padding of a batch), which writes nothing."""
    got = run(slots=(9, -1, 15))
    for x in got["pages"][:2]:
        written = x.isfinite().all(-1).all(1)  # [pages, offsets]
        assert written.nonzero().tolist() == [[2, 1], [3, 3]]
        assert x.isnan().sum() == x.numel() - 2 * KV_HEADS * 16
    assert torch.equal(got["q"], run()["q"])  # the row is still normalised and rotated


def test_no_rows():
    """Guards an empty step: it returns no rows and writes nothing."""
    got = run(slots=())
    assert got["q"].shape == (0, HEADS, 16)
    assert got["pages"].k.isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(3, 127)}, "qkv must be"),
        ({"qkv": torch.zeros(3, 4 * 16)}, "qkv must be"),
        (
            {"pages": KVPages(torch.zeros(5, 2, 4, 16), torch.zeros(5, 2, 4, 8))},
            "pages.v must have the shape of pages.k",
        ),
        ({"k_weight": None}, "give both"),
        ({"q_weight": torch.zeros(8)}, r"q_weight must be \[16\]"),
        ({"frequencies": torch.zeros(9, dtype=torch.long)}, "R <= D"),
        ({"frequencies": torch.zeros(8)}, "frequencies must be int64"),
        ({"positions": torch.zeros(2, dtype=torch.long)}, r"positions must be \[3\]"),
        ({"slots": torch.zeros(4, dtype=torch.long)}, r"slots must be \[3\]"),
    ],
)
def test_shapes_are_checked(change: dict, message: str):
    """Guards shapes that would broadcast into wrong numbers or write out of bounds."""
    good = run()
    del good["q"]
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**(good | change))
