"""Peers of the small ops: torch.compile's graphs, and the calls of Liger and FlashInfer."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bench.inputs.presets import TINY, heads_of
from bench.measure.devices import DTYPES
from bench.measure.verdicts import judge, reference
from bench.peers import compile_peer, flashinfer_peer, liger_peer
from bench.peers.peer import Unavailable
from bench.suite import (
    PEERS,
    layer_norm,
    linear_quick_gelu,
    patchify,
    projector,
    qk_norm_rope,
    quick_gelu,
    rms_norm,
    silu_mul,
)

CPU = torch.device("cpu")
CASES = {
    "rms_norm": [rms_norm.case(3, 64), rms_norm.case(3, 64, residual=False)],
    "layer_norm": [layer_norm.case(3, 64), layer_norm.case(3, 64, residual=False)],
    "silu_mul": [silu_mul.case(3, 64)],
    "quick_gelu": [quick_gelu.case(3, 64)],
    "linear_quick_gelu": [linear_quick_gelu.case(3, 64, 32)],
    "patchify": [patchify.case([(2, 3)], [(1, 2)])],
    "qk_norm_rope": [qk_norm_rope.case(7, heads_of(TINY), skip=2)],
    "projector": [projector.case([(5, 7), (4, 4)], 8, 12, scattered=flag) for flag in (0, 1)],
}
each_case = pytest.mark.parametrize(
    "case",
    [case for op_cases in CASES.values() for case in op_cases],
    ids=lambda c: f"{c.op} {c.name}",
)


def verdict_of(case, name, dtype=torch.float32):
    inputs = case.inputs(0, CPU, dtype)
    return judge(case, PEERS[case.op][name], inputs, reference(case, inputs))


class TestCompile:
    @pytest.fixture
    def without_compiler(self, monkeypatch):
        """Runs traced graphs uncompiled, because compiling them takes a minute."""
        traced, compiled = [], torch.compile

        def backend(graph, example):
            traced.append(graph)
            return graph

        monkeypatch.setattr(torch, "compile", partial(compiled, backend=backend))
        monkeypatch.setattr(compile_peer.shutil, "which", lambda name: name)
        yield traced
        torch._dynamo.reset()

    @each_case
    def test_one_graph_each(self, without_compiler, case):
        """Guards the baseline: each op is compiled as one graph, not in pieces or not at all."""
        assert verdict_of(case, "compile").failure is None
        assert len(without_compiler) == 1
        assert any(node.op == "call_function" for node in without_compiler[0].graph.nodes)

    def test_every_shape_is_compiled(self, without_compiler):
        """Guards the peer's times at later shapes: dynamo stops compiling after eight shapes, or
        compiles for dynamic sizes."""
        for rows in range(2, 14):
            verdict_of(silu_mul.case(rows, 8), "compile")
        shapes = [
            node.meta["example_value"].shape
            for graph in without_compiler
            for node in graph.graph.nodes
            if node.op == "placeholder"
        ]
        assert shapes == [(rows, 16) for rows in range(2, 14)]

    def test_without_a_compiler(self, monkeypatch):
        """Guards the row's one-line reason, instead of torch's long message about C++ compilers."""
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(Unavailable, match="no-such-compiler was not found"):
            verdict_of(CASES["silu_mul"][0], "compile")


def normed(x, weight, eps):
    return F.rms_norm(x, weight.shape, weight, eps)


class TestLiger:
    """The fakes have the arguments of liger-kernel 0.8.5's forward functions."""

    @pytest.fixture(autouse=True)
    def library(self, monkeypatch):
        def fused_add(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=False):
            return normed(X + R, W, eps), X + R

        functions = {
            "LigerRMSNormFunction": lambda X, W, eps, offset=0.0: normed(X, W, eps),
            "LigerFusedAddRMSNormFunction": fused_add,
            "LigerLayerNormFunction": lambda X, W, B, eps: F.layer_norm(X, W.shape, W, B, eps),
            "LigerFusedGateUpSiLUMulFunction": lambda y, in_place=False: (
                F.silu(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1]
            ),
        }
        fake = SimpleNamespace(**{n: SimpleNamespace(apply=f) for n, f in functions.items()})
        monkeypatch.setattr(liger_peer, "on_gpu", lambda device: None)
        monkeypatch.setattr(liger_peer, "imported", lambda name: fake)
        return fake

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("op", ["rms_norm", "layer_norm", "silu_mul"])
    def test_numbers(self, op, dtype):
        """Guards the calls: order of arguments, with and without residual and LayerScale."""
        for case in CASES[op]:
            assert verdict_of(case, "liger", dtype).failure is None, case.name

    def test_interleaved_pairs(self):
        """Guards the row's reason: Liger would mistake gates for ups."""
        with pytest.raises(Unavailable, match="only as halves"):
            verdict_of(silu_mul.case(3, 64, interleaved=True), "liger")

    def test_older_versions(self, library):
        """Guards the row's reason if the installed version lacks a function."""
        del library.LigerFusedGateUpSiLUMulFunction
        with pytest.raises(Unavailable, match="LigerFusedGateUpSiLUMulFunction"):
            verdict_of(CASES["silu_mul"][0], "liger")


class TestFlashInfer:
    """The fakes have the arguments of flashinfer-python 0.6.13."""

    @pytest.mark.parametrize("op", ["rms_norm", "silu_mul"])
    def test_numbers(self, monkeypatch, op):
        """Guards the calls. The one with a residual works in place, but must not modify the
        inputs, which the op's forms share."""

        def fused_add_rmsnorm(input, residual, weight, eps=1e-6, enable_pdl=None):
            residual += input
            input.copy_(normed(residual, weight, eps))

        def rmsnorm(input, weight, eps=1e-6, out=None, enable_pdl=None):
            return normed(input, weight, eps)

        def silu_and_mul(input, out=None, enable_pdl=None):
            return F.silu(input.chunk(2, -1)[0]) * input.chunk(2, -1)[1]

        library = SimpleNamespace(
            fused_add_rmsnorm=fused_add_rmsnorm, rmsnorm=rmsnorm, silu_and_mul=silu_and_mul
        )
        monkeypatch.setattr(flashinfer_peer, "on_gpu", lambda device: None)
        monkeypatch.setattr(flashinfer_peer, "imported", lambda name: library)
        for case in CASES[op]:
            assert verdict_of(case, "flashinfer").failure is None, case.name
            inputs = case.inputs(0, CPU, torch.float32)
            before = {name: x.clone() for name, x in inputs.items() if isinstance(x, torch.Tensor)}
            PEERS[op]["flashinfer"](inputs)()
            assert all(torch.equal(inputs[name], x) for name, x in before.items())


@pytest.mark.parametrize("op", CASES)
def test_what_cannot_run_says_why(op):
    """Guards the table's footer: on a CPU, a peer that needs a GPU says so."""
    for name in PEERS[op].keys() & {"liger", "flashinfer"}:
        with pytest.raises(Unavailable, match="needs a GPU"):
            verdict_of(CASES[op][0], name)


@pytest.mark.gpu
@each_case
def test_numbers(case):
    """Guards the installed peers on the device on which they are measured."""
    inputs = case.inputs(0, torch.device("cuda"), torch.bfloat16)
    expected = reference(case, inputs)
    for name, peer in PEERS[case.op].items():
        try:
            verdict = judge(case, peer, inputs, expected)
        except Unavailable:
            continue
        assert verdict.failure is None, name
