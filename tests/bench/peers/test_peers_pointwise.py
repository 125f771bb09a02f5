"""Comparators of the small ops: torch.compile's graphs, and the calls of Liger and FlashInfer."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from bench import cases, ops
from bench.numerics import judge, reference
from bench.peers import PEERS, Unavailable, compile_peer, flashinfer_peer, liger_peer

CPU = torch.device("cpu")
CASES = {
    "rms_norm": [cases._rms_norm(3, 64), cases._rms_norm(3, 64, residual=False)],
    "layer_norm": [cases._layer_norm(3, 64), cases._layer_norm(3, 64, residual=False)],
    "silu_mul": [cases._silu_mul(3, 64)],
    "quick_gelu": [cases._quick_gelu(3, 64)],
    "linear_quick_gelu": [cases._linear_quick_gelu(3, 64, 32)],
    "qk_norm_rope": [cases._qk_norm_rope(7, "tiny", skip=2)],
    "projector": [cases._projector([(5, 7), (4, 4)], 8, 12, scattered=flag) for flag in (0, 1)],
}
each_case = pytest.mark.parametrize(
    "case", [case for of_op in CASES.values() for case in of_op], ids=lambda c: f"{c.op} {c.name}"
)


def verdict_of(case, name, dtype=torch.float32):
    made = case.inputs(0, CPU, dtype)
    return judge(case, PEERS[case.op][name], made, reference(case, made))


class TestCompile:
    @pytest.fixture
    def without_compiler(self, monkeypatch):
        """Graphs as they are traced, run by PyTorch: their compilation takes a minute."""
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
        """Guards the bar: an op in pieces, or one that dynamo runs as it is, is no compiled op."""
        assert verdict_of(case, "compile").failure is None
        assert len(without_compiler) == 1
        assert any(node.op == "call_function" for node in without_compiler[0].graph.nodes)

    def test_every_shape_is_compiled(self, without_compiler):
        """Guards the peer's times at later shapes, where dynamo stops compiling after eight, or
        compiles for sizes that it does not know."""
        for rows in range(2, 14):
            verdict_of(cases._silu_mul(rows, 8), "compile")
        shapes = [
            node.meta["example_value"].shape
            for graph in without_compiler
            for node in graph.graph.nodes
            if node.op == "placeholder"
        ]
        assert shapes == [(rows, 16) for rows in range(2, 14)]

    def test_without_a_compiler(self, monkeypatch):
        """Guards the reason beside the row, instead of torch's pages about its C++ compiler."""
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(Unavailable, match="no-such-compiler is not there"):
            verdict_of(CASES["silu_mul"][0], "compile")


def normed(x, weight, eps):
    return F.rms_norm(x, weight.shape, weight, eps)


class TestLiger:
    """The stand-ins have the arguments of liger-kernel 0.8.5's forward functions."""

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
        made = SimpleNamespace(**{n: SimpleNamespace(apply=f) for n, f in functions.items()})
        monkeypatch.setattr(liger_peer, "on_gpu", lambda device: None)
        monkeypatch.setattr(liger_peer, "imported", lambda name: made)
        return made

    @pytest.mark.parametrize("dtype", ops.DTYPES)
    @pytest.mark.parametrize("op", ["rms_norm", "layer_norm", "silu_mul"])
    def test_numbers(self, op, dtype):
        """Guards the calls: arguments in Liger's order, residual and LayerScale where they are."""
        for case in CASES[op]:
            assert verdict_of(case, "liger", dtype).failure is None, case.name

    def test_interleaved_pairs(self):
        """Guards the reason beside the row: Liger would take gates for ups."""
        with pytest.raises(Unavailable, match="halves only"):
            verdict_of(cases._silu_mul(3, 64, interleaved=True), "liger")

    def test_older_versions(self, library):
        """Guards the reason beside the row, where a function came with a later version."""
        del library.LigerFusedGateUpSiLUMulFunction
        with pytest.raises(Unavailable, match="LigerFusedGateUpSiLUMulFunction"):
            verdict_of(CASES["silu_mul"][0], "liger")


class TestFlashInfer:
    """The stand-ins have the arguments of flashinfer-python 0.6.13."""

    @pytest.mark.parametrize("op", ["rms_norm", "silu_mul"])
    def test_numbers(self, monkeypatch, op):
        """Guards the calls, of which the one with a residual works in place: not in the inputs,
        which the op's forms share."""

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
            made = case.inputs(0, CPU, torch.float32)
            before = {name: x.clone() for name, x in made.items() if isinstance(x, torch.Tensor)}
            PEERS[op]["flashinfer"](made)()
            assert all(torch.equal(made[name], x) for name, x in before.items())


@pytest.mark.parametrize("op", CASES)
def test_what_cannot_run_says_why(op):
    """Guards the table's footer: a peer that needs a GPU says so on a CPU."""
    for name in PEERS[op].keys() & {"liger", "flashinfer"}:
        with pytest.raises(Unavailable, match="needs a GPU"):
            verdict_of(CASES[op][0], name)


@pytest.mark.gpu
@each_case
def test_numbers(case):
    """Guards the baselines on the device where they matter, those that are installed."""
    made = case.inputs(0, torch.device("cuda"), torch.bfloat16)
    expected = reference(case, made)
    for name, peer in PEERS[case.op].items():
        try:
            verdict = judge(case, peer, made, expected)
        except Unavailable:
            continue
        assert verdict.failure is None, name
