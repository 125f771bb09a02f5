"""Linear layers with packed weights: the same products, and the weight's bits and changes kept."""

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from kernels import onednn
from model.modules import Linear
from model.step3vl import Step3VL
from tests.support.errors import max_error

pytestmark = pytest.mark.skipif(
    not onednn.packing_pays(torch.float32),
    reason="this CPU, or this PyTorch, does not pack weights",
)


@pytest.fixture
def linear() -> Linear:
    """An odd shape, so that the packed layout is padded."""
    generator = torch.Generator().manual_seed(0)
    return Linear(nn.Parameter(torch.randn(70, 33, generator=generator), requires_grad=False))


def check(linear: Linear, weight: torch.Tensor) -> None:
    """Both forms compute with `weight`."""
    x = torch.randn(5, 33, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for impl in (None, "eager", None):
            assert max_error(linear(x, impl), x @ weight.T) < 1e-5, impl


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (70, 33), (128, 64), (17, 1025)])
def test_packing_keeps_the_bits(shape: tuple[int, int], dtype: torch.dtype):
    """Guards checkpoints saved from packed weights, padding of the packed layout included."""
    if not onednn.packing_pays(dtype):
        pytest.skip(f"{dtype} is not packed here")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    linear = Linear(nn.Parameter(weight.clone(), requires_grad=False))
    linear.pack()
    assert linear.weight.is_mkldnn and linear.weight.shape == shape
    linear.unpack()
    assert torch.equal(linear.weight, weight)


def test_impls_take_turns(linear: Linear):
    """Guards a benchmark that alternates impls: each keeps its form of the weight, packed once."""
    weight = linear.weight.clone()
    linear.pack()
    check(linear, weight)
    plain, packed = linear.weight, linear._packed
    assert plain.is_mkldnn is False and packed is not None
    check(linear, weight)
    assert linear.weight is plain and linear._packed is packed


def test_changes_in_place(linear: Linear):
    """Guards products with the weight as it was when it was packed."""
    check(linear, linear.weight.clone())
    linear.weight.mul_(2)
    check(linear, linear.weight.clone())
    linear.weight[3:5].view(-1)[7] = 100
    check(linear, linear.weight.clone())


def test_replaced_weights(linear: Linear):
    """Guards products with an old weight after another took its place: all have low versions."""
    check(linear, linear.weight.clone())
    for weight in (torch.ones(70, 33), torch.eye(70, 33)):
        linear.weight = nn.Parameter(weight, requires_grad=False)
        check(linear, weight)
    linear.weight.data = torch.full((70, 33), 0.5)
    check(linear, torch.full((70, 33), 0.5))
    linear.pack()
    linear.weight = nn.Parameter(torch.ones(70, 33), requires_grad=False)
    check(linear, torch.ones(70, 33))
    given = {"weight": torch.eye(70, 33)}
    x = torch.randn(5, 33, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.func.functional_call(linear, given, (x,)), x @ torch.eye(70, 33).T)
    check(linear, torch.ones(70, 33))


def test_only_one_form_is_held(linear: Linear):
    """Guards memory: a weight that was packed is not held plain, too, after it was saved, copied,
    converted or loaded; and is still packed if it was packed in inference mode before."""
    weight = linear.weight.clone()
    for disturb in (
        linear.state_dict,
        lambda: copy.deepcopy(linear),
        lambda: linear.to(torch.float32),
        lambda: linear.load_state_dict({"weight": weight}),
    ):
        linear.pack()
        disturb()
        with torch.inference_mode():
            linear(weight[:2])
        assert linear.weight.is_mkldnn and linear._packed is None
    with torch.inference_mode():
        linear.unpack()
        linear(weight[:2])
    linear.pack()
    assert linear.packs(None)
    check(linear, weight)


def test_state_dict(linear: Linear):
    """Guards load_state_dict and state_dict of a packed layer: as those of a plain one."""
    before, after = linear.weight.clone(), torch.ones(70, 33)
    linear.pack()
    assert torch.equal(linear.state_dict()["weight"], before)
    linear.pack()
    linear.load_state_dict({"weight": after})
    check(linear, after)


def test_copies(linear: Linear):
    """Guards copy.deepcopy and pickle of a packed layer, and copies that share the original's
    weight or unpack it when they load another."""
    weight = linear.weight.clone()
    for copied in (copy.deepcopy, lambda packed: pickle.loads(pickle.dumps(packed))):
        linear.pack()
        other = copied(linear)
        linear.pack()
        other.load_state_dict({"weight": torch.ones(70, 33)})
        assert linear.weight.is_mkldnn
        check(other, torch.ones(70, 33))
        check(linear, weight)


def test_conversion(linear: Linear):
    """Guards `to` of a packed layer, whose packed weight has the old dtype."""
    weight = linear.weight.clone()
    linear.pack()
    linear.to(torch.bfloat16).to(torch.float32)
    check(linear, weight.bfloat16().float())


@pytest.fixture
def model() -> Step3VL:
    return Step3VL.from_preset("tiny")


def test_loaded_models_are_packed(model: Step3VL, tmp_path: Path):
    """Guards memory for two copies of each weight, and what `save_pretrained` writes."""
    layers = model.decoder.layers
    assert all(layer.down.weight.is_mkldnn for layer in layers)
    assert not model.decoder.embed_tokens.is_mkldnn  # rows of it are looked up
    expected = model([1, 2, 3])
    model.save_pretrained(tmp_path / "saved")
    assert all(layer.down.weight.is_mkldnn for layer in layers)
    again = Step3VL.from_pretrained(tmp_path / "saved")
    pairs = zip(*(m.checkpoint_tensors().items() for m in (model, again)), strict=True)
    assert all(name == other and torch.equal(a, b) for (name, a), (other, b) in pairs)
    assert torch.equal(model([1, 2, 3]), expected)


def test_weights_changed_through_the_checkpoint(model: Step3VL):
    """Guards changes through views of the weights, before and after the model has run."""
    expected = model([1, 2, 3])
    weight = model.checkpoint_tensors()["model.layers.0.mlp.down_proj.weight"]
    original = weight.clone()
    weight.zero_()
    assert max_error(model([1, 2, 3]), expected) > 1e-3
    weight.copy_(original)
    assert max_error(model([1, 2, 3]), expected) < 1e-6


@pytest.fixture
def choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    _forget()
    yield monkeypatch
    _forget()


def _forget() -> None:
    onednn.packing_pays.cache_clear()
    onednn.products_pay.cache_clear()


def test_packing_can_be_switched_off(choice: pytest.MonkeyPatch):
    choice.setenv("PACORE_ONEDNN", "0")
    assert not Step3VL.from_preset("tiny").decoder.layers[0].qkv.weight.is_mkldnn
    assert not onednn.products_pay(torch.float32)


GROWTH = """
import torch
from kernels import onednn

def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

packed, x = onednn.pack(torch.randn(576, 1536)), torch.randn(512, 1536)
with torch.inference_mode():
    onednn.product(x, packed)
    before = rss()
    for rows in range(1, 513):
        onednn.product(x[:rows], packed)
print((rss() - before) / 2**20)
"""


@pytest.mark.cli
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_for_products_is_bounded():
    """Code for a product of every number of rows, kept for ever: 0.6 MB each."""
    names = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", GROWTH]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert float(found.stdout) < 200  # 330 with the defaults


@pytest.mark.parametrize(
    ("machine", "capability", "packing", "products"),
    [
        ("x86_64", "AVX512", True, True),
        ("AMD64", "AVX2", True, False),
        ("aarch64", "SVE256", False, False),
    ],
)
def test_what_pays_where(
    choice: pytest.MonkeyPatch, machine: str, capability: str, packing: bool, products: bool
):
    """Guards plain products by oneDNN where BLAS is faster, and CPUs that were not measured."""
    choice.setenv("PACORE_ONEDNN", "auto")
    choice.setattr("platform.machine", lambda: machine)
    choice.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    assert onednn.packing_pays(torch.float32) == packing
    assert onednn.products_pay(torch.float32) == products
