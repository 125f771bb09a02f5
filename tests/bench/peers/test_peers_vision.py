"""Peers of the vision ops: their calls, and their results as far as a CPU can compute them."""

import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bench.measure.devices import DTYPES
from bench.measure.verdicts import judge, reference
from bench.peers import projector_peer, vision_peer
from bench.peers.flash_attention import fa2_peer, fa3_peer
from bench.peers.peer import Unavailable
from bench.suite import PEERS, vision_attention
from bench.suite import projector as suite_projector

VISION, PROJECTOR = PEERS["vision_attention"], PEERS["projector"]
CUDNN = ("cudnn", "cudnn-folded")
CPU = torch.device("cpu")
GRIDS = [(5, 7), (5, 7), (1, 1), (8, 3), (5, 7)]  # runs of 2, 1, 1 and 1 views: a grid occurs again
FA3_NAMES = (
    "q", "k", "v", "k_new", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "max_seqlen_q",
    "max_seqlen_k", "page_table", "softmax_scale", "is_causal", "window_size_left",
    "window_size_right", "softcap", "scheduler_metadata", "num_splits", "sm_margin",
)  # fmt: skip


@pytest.fixture
def plain_rotation(monkeypatch):
    """Rotation without torch.compile, which takes longer than all of these tests."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def attend(q, k, v, starts_q, starts_k, longest_q, longest_k):
    """Attention of varlen libraries, for tensors [T, H, D]."""
    assert torch.equal(starts_q, starts_k)
    assert starts_q.dtype == torch.int32
    sizes = starts_q.diff().tolist()
    assert longest_q == longest_k == max(sizes)
    outs = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in views))[0]
        for views in zip(*(x.split(sizes) for x in (q, k, v)), strict=True)
    ]
    return torch.cat(outs, dim=1).transpose(0, 1)


def verdict_of(peer, case, dtype=torch.float32):
    inputs = case.inputs(0, CPU, dtype)
    return judge(case, peer, inputs, reference(case, inputs))


class TestVisionAttention:
    @pytest.mark.parametrize("name", ["sdpa-flash", "sdpa-flash-alone"])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("grids", [GRIDS, [(6, 6)] * 3])
    def test_sdpa(self, plain_rotation, name, dtype, grids):
        """Guards the baseline: rotation, batches of views with one grid, and the result's order."""
        case = vision_attention.case(grids, heads=2)
        assert verdict_of(VISION[name], case, dtype).failure is None

    @pytest.mark.parametrize("suffix", ["", "-alone"])
    def test_varlen(self, plain_rotation, monkeypatch, suffix):
        """Guards the calls of libraries for packed sequences."""
        varlen = SimpleNamespace(varlen_attn=attend, __name__="varlen")
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", varlen)
        monkeypatch.setattr(vision_peer, "on_gpu", lambda device: None)
        package = SimpleNamespace(flash_attn_varlen_func=attend)
        monkeypatch.setattr(fa2_peer, "check", lambda device: package)
        case = vision_attention.case(GRIDS, heads=2)
        for name in ("torch-varlen", "fa2-varlen"):
            assert verdict_of(VISION[name + suffix], case).failure is None, name

    def test_fa3(self, plain_rotation, monkeypatch):
        """Guards FA3's call: arguments by name through the library's schema, without a mask."""

        def fwd(*values):
            named_args = dict(zip(FA3_NAMES, values, strict=True))
            assert named_args["softmax_scale"] == 96**-0.5
            assert named_args["is_causal"] is False
            assert named_args["window_size_left"] == named_args["window_size_right"] == -1
            assert named_args["page_table"] is named_args["seqused_k"] is None
            names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
            out = attend(*(named_args[name] for name in ("q", "k", "v", *names)))
            return out, torch.empty(0), None

        named = [SimpleNamespace(name=name) for name in FA3_NAMES]
        fwd.default = SimpleNamespace(_schema=SimpleNamespace(arguments=named))
        monkeypatch.setattr(fa3_peer, "check", lambda device: SimpleNamespace(fwd=fwd))
        case = vision_attention.case(GRIDS, heads=2)
        for name in ("fa3-varlen", "fa3-varlen-alone"):
            assert verdict_of(VISION[name], case).failure is None, name

    def test_torch_takes_these_arguments(self):
        """Guards the fake above against a torch with other arguments."""
        from torch.nn.attention.varlen import varlen_attn

        bound = inspect.signature(varlen_attn).bind(*"qkv", "starts", "starts", 3, 3).arguments
        assert list(bound)[3:] == ["cu_seq_q", "cu_seq_k", "max_q", "max_k"]

    def test_what_is_timed(self, monkeypatch):
        """Guards what is timed: one kind of peer rotates in every call, "-alone" never does."""
        rotations = []
        original = vision_peer.rotated
        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
        monkeypatch.setattr(
            vision_peer, "rotated", lambda *args: rotations.append(1) or original(*args)
        )
        inputs = vision_attention.case([(3, 4)], heads=1).inputs(0, CPU, torch.float32)
        for name, before, after in (("sdpa-flash", 0, 2), ("sdpa-flash-alone", 1, 1)):
            rotations.clear()
            call = VISION[name](inputs)
            assert len(rotations) == before
            call(), call()
            assert len(rotations) == after


class TestProjector:
    @pytest.mark.parametrize("name", CUDNN)
    @pytest.mark.parametrize("scattered", [False, True])
    def test_numbers(self, monkeypatch, name, scattered):
        """Guards the baseline: cuDNN measures its algorithms, with the named weights, and does not
        reuse those remembered for the forms."""
        monkeypatch.setattr(projector_peer, "check", lambda device: None)
        calls, original = [], projector_peer.projector

        def projector(**named_args):
            flags = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
            calls.append((*flags, named_args["folded"] is not None))
            return original(**named_args)

        monkeypatch.setattr(projector_peer, "projector", projector)
        case = suite_projector.case([(5, 7), (4, 4)], width=8, out=12, scattered=scattered)
        assert verdict_of(PROJECTOR[name], case).failure is None
        assert calls == [(True, True, name == "cudnn-folded")]
        assert torch.backends.cudnn.benchmark is torch.backends.cudnn.deterministic is False


class TestAbsence:
    @pytest.mark.parametrize(
        "name", [*(name for name in VISION if not name.startswith("sdpa-flash")), *CUDNN]
    )
    def test_what_cannot_run_says_why(self, plain_rotation, name):
        """Guards the table's footer: a missing peer has a reason, in one line."""
        case = vision_attention.case([(3, 4)], heads=1)
        if name in CUDNN:
            case = suite_projector.case([(3, 4)], width=8, out=12)
        with pytest.raises(Unavailable) as reason:
            (VISION | PROJECTOR)[name](case.inputs(0, CPU, torch.float32))()
        assert len(str(reason.value).splitlines()) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", VISION | PROJECTOR)
def test_numbers(name):
    """Guards the installed peers on the device on which they are measured."""
    case = vision_attention.case(GRIDS, heads=2)
    if name in PROJECTOR:
        case = suite_projector.case([(5, 7), (4, 4)], width=64, out=128)
    inputs = case.inputs(0, torch.device("cuda"), torch.bfloat16)
    try:
        verdict = judge(case, (VISION | PROJECTOR)[name], inputs, reference(case, inputs))
    except Unavailable as reason:
        pytest.skip(f"{name}: {reason}")
    assert verdict.failure is None
