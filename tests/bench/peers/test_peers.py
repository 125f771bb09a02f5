"""Peers of prefix attention, as far as they can be tested without their libraries."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from bench.inputs import plans as inputs
from bench.inputs.trees import Node, fork
from bench.measure.verdicts import judge, reference
from bench.peers import (
    fasttree_peer,
    flashinfer_peer,
    layout,
    sdpa_peer,
)
from bench.peers.flash_attention import fa2_peer, fa3_peer, vllm_object
from bench.peers.flex_peer import flex
from bench.peers.layout import levels, paged
from bench.peers.peer import Unavailable
from bench.suite import PEERS, prefix_attention
from bench.suite.op import Case
from tests.support.errors import max_error

PREFIX = PEERS["prefix_attention"]
CPU = torch.device("cpu")
PAGE = 4
FORESTS = {
    "ragged forks": [fork(130, [1, 63, 64, 65]), fork(5, [7])],
    "two levels": [Node(70, children=(fork(3, [9, 9]), fork(64, [9, 9])))],
    "pure causal": [Node(13, new=13)],
    "chunk after a prefix": [Node(100, new=37)],
    "chunk with decode": [Node(10, new=6), fork(9, [3, 2])],
    "equal lengths": [fork(64, [64] * 3)],
    # Rows of a parent and of its children; depths of one, two and three in one batch.
    "parent and children": [
        Node(9, new=3, children=(Node(4, new=2), Node(5, children=(Node(0), Node(3, new=3))))),
        Node(6, new=1),
    ],
}
forests = pytest.mark.parametrize("forest", FORESTS.values(), ids=FORESTS)


def small_case(forest, head_dim=8, **options):
    """A prefix_attention case of 4/2 heads on pages of 4 tokens."""
    case = prefix_attention.case("test", forest, heads=(4, 2, head_dim), **options)
    build = partial(case.inputs.func, **case.inputs.keywords | {"page_size": PAGE})
    return Case(case.op, case.name, build, case.values, case.flops)


def attend(q, k, v, scale, causal, window=0):
    """q [m, Hq, D] over gathered k, v [n, Hkv, D], rows at the end; out, lse [m, Hq]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("mhd,nhd->mhn", q, k) * scale
    distance = torch.arange(len(k)) - (len(k) - len(q)) - torch.arange(len(q))[:, None]
    hidden = (distance > 0) & causal | (distance <= -window if window else False)
    scores = scores.masked_fill(hidden[:, None], -torch.inf)
    return torch.einsum("mhn,nhd->mhd", scores.softmax(-1), v), scores.logsumexp(-1)


def gathered(pool, kv_range):
    """The tokens in a range's block table, [length, Hkv, D]."""
    return pool[kv_range.pages.long()].transpose(1, 2).flatten(0, 1)[: kv_range.length]


class TestTorch:
    @pytest.mark.parametrize("window", [0, 7])
    @forests
    def test_every_row_attends_to_what_it_sees(self, forest, window):
        """Guards the baselines: a peer that attends to too few tokens is easily beaten."""
        case = small_case(forest, window=window)
        case_inputs = case.inputs(0, CPU, torch.float32)
        expected = reference(case, case_inputs)
        for peer in (PREFIX["sdpa"], partial(flex, compiled=False)):
            verdict = judge(case, peer, case_inputs, expected)
            assert verdict.failure is None, peer

    def test_sdpa_takes_the_cheapest_mask(self):
        """Guards the baseline's speed: a needless mask keeps SDPA off its fast kernels."""

        def masking(forest):
            plan = inputs.prefix_plan(0, "cpu", forest=forest)
            return sdpa_peer._masking(sdpa_peer._padded(plan, 2, CPU)[2])

        assert masking(FORESTS["equal lengths"]) == {}
        assert masking(FORESTS["pure causal"]) == {"is_causal": True}
        assert masking(FORESTS["chunk after a prefix"]).keys() == {"attn_mask"}


class TestLayout:
    @pytest.mark.parametrize("window", [0, 7])
    @pytest.mark.parametrize("copied", [False, True])
    @pytest.mark.parametrize("page_size", [None, 16])
    @forests
    def test_block_tables(self, forest, page_size, copied, window):
        """Guards every paged peer: block tables contain each sequence's tokens in order."""
        case = small_case(forest, window=window)
        case_inputs = case.inputs(0, CPU, torch.float32)
        (expected,) = reference(case, case_inputs)
        copy = case_inputs | {"pages": case_inputs["pages"].map(torch.clone)}
        result = paged(copy, copied=copied, page_size=page_size)
        assert result.k.shape[2] == (page_size or PAGE)
        assert result.k.isfinite().all()
        out = torch.full_like(case_inputs["q"], torch.nan)
        for s in result.kv_ranges:
            k, v = gathered(result.k, s), gathered(result.v, s)
            out[s.start : s.end], _ = attend(
                case_inputs["q"][s.start : s.end], k, v, case_inputs["scale"], True, window
            )
        assert max_error(out, expected) < 1e-5
        pages = torch.cat([kv_range.pages for kv_range in result.kv_ranges])
        if copied:
            assert len(pages.unique()) == len(pages) == len(result.k)

    def test_full_pages_are_shared(self):
        """Guards the engines' baseline: only a partly filled page is rebuilt."""
        case_inputs = small_case([fork(4 * PAGE + 1, [2, 9])]).inputs(0, CPU, torch.float32)
        result = paged(case_inputs)
        first, second = result.kv_ranges
        assert first.pages[:4].tolist() == list(case_inputs["plan"].nodes[0].pages[:4])
        assert first.pages[:4].tolist() == second.pages[:4].tolist()
        assert len(result.k) == case_inputs["pages"].num_pages + 1 + 3
        whole = small_case([fork(4 * PAGE, [2, 9])]).inputs(0, CPU, torch.float32)
        assert paged(whole).k is whole["pages"].k, "no page was rebuilt or copied"

    def test_larger_pages_are_shared(self):
        """Guards FA2's baseline: rebuilt for its page size, a shared prefix is stored once."""
        case_inputs = small_case([fork(4 * PAGE, [2, 9])]).inputs(0, CPU, torch.float32)
        result = paged(case_inputs, page_size=2 * PAGE)
        first, second = (kv_range.pages.tolist() for kv_range in result.kv_ranges)
        assert first[:2] == second[:2]
        assert sorted(first + second[2:]) == list(range(len(result.k))), "no other pages"

    @forests
    def test_levels(self, forest):
        """Guards the cascades: over all levels, each row attends to its path exactly once."""
        case = small_case(forest)
        case_inputs = case.inputs(0, CPU, torch.float32)
        (expected,) = reference(case, case_inputs)
        tree = levels(case_inputs)
        outs, lses = [], []
        for kv_ranges in tree:
            assert kv_ranges[0].start == 0
            assert [s.end for s in kv_ranges[:-1]] == [s.start for s in kv_ranges[1:]]
            assert kv_ranges[-1].end == case_inputs["plan"].num_rows
            out = torch.zeros_like(case_inputs["q"])
            lse = case_inputs["q"].new_full(case_inputs["q"].shape[:2], -torch.inf)
            for s in (s for s in kv_ranges if s.length):
                k, v = gathered(case_inputs["pages"].k, s), gathered(case_inputs["pages"].v, s)
                out[s.start : s.end], lse[s.start : s.end] = attend(
                    case_inputs["q"][s.start : s.end],
                    k,
                    v,
                    case_inputs["scale"],
                    kv_ranges is tree[-1],
                )
            outs.append(out)
            lses.append(lse.T)
        assert max_error(fa3_peer.merge(tuple(outs), tuple(lses)), expected) < 1e-5

    def test_a_prefix_is_one_range(self):
        """Guards the point of a cascade: a group's shared node is one KV range for all its rows."""
        case_inputs = small_case([fork(8, [2, 3]), fork(9, [4])]).inputs(0, CPU, torch.float32)
        first, last = levels(case_inputs)
        assert [(s.start, s.end, s.length) for s in first] == [(0, 2, 8), (2, 3, 9)]
        assert [(s.start, s.end, s.length) for s in last] == [(0, 1, 2), (1, 2, 3), (2, 3, 4)]

    def test_tables_of_flashinfer(self):
        """Guards indptr, indices and the number of tokens in the last page: 1 to a full page, or 0
        for an empty range."""
        pages = [torch.tensor(ids, dtype=torch.int32) for ids in ([7, 3], [5], [], [1, 2])]
        kv_ranges = [
            layout.KVRange(row, row + 1, ids, length)
            for row, (ids, length) in enumerate(zip(pages, (5, 4, 0, 8), strict=True))
        ]
        starts, indices, lasts = flashinfer_peer._tables(kv_ranges, PAGE)
        assert starts.tolist() == [0, 2, 3, 3, 5]
        assert indices.tolist() == [7, 3, 5, 1, 2]
        assert lasts.tolist() == [1, 4, 0, 4]
        assert flashinfer_peer._rows(kv_ranges).tolist() == [0, 1, 2, 3, 4]
        assert layout.block_table(kv_ranges).tolist() == [[7, 3], [5, 0], [0, 0], [1, 2]]
        for tensor in (starts, indices, lasts, layout.block_table(kv_ranges)):
            assert tensor.dtype == torch.int32


@pytest.fixture
def on_any_device(monkeypatch):
    """Lets adapters run without a GPU, with fakes of their libraries."""
    for module in (fa2_peer, fasttree_peer):
        monkeypatch.setattr(module, "on_gpu", lambda device: None)


def paged_attention(q, k, v, tables, lengths, starts, scale, window):
    """A library's attention over pages [n, page, Hkv, D]: causal, rows at the sequence's end."""
    outs = []
    for table, length, rows in zip(tables, lengths.tolist(), q.split(starts.tolist()), strict=True):
        keys, values = (x[table.long()].flatten(0, 1)[:length] for x in (k, v))
        outs.append(attend(rows, keys, values, scale, True, window)[0])
    return torch.cat(outs)


class TestFlashAttention2:
    NAMES = (
        "q", "k", "v", "out", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "leftpad_k",
        "block_table", "alibi_slopes", "max_seqlen_q", "max_seqlen_k", "p_dropout",
        "softmax_scale", "zero_tensors", "is_causal", "window_size_left", "window_size_right",
        "softcap", "return_softmax", "num_splits", "gen",
    )  # fmt: skip

    def case_and_inputs(self, forest, window, page_size):
        case = small_case(forest, window=window)
        build = partial(case.inputs.func, **case.inputs.keywords | {"page_size": page_size})
        case_inputs = build(0, CPU, torch.float32)
        return case, case_inputs, reference(case, case_inputs)

    @pytest.mark.parametrize("window", [0, 7])
    @forests
    def test_of_vllm(self, on_any_device, monkeypatch, forest, window):
        """Guards the call of vLLM's op: arguments by name through its schema, and the tables.

        The schema is that of vllm 0.25.1.
        """

        def varlen_fwd(*values):
            named_args = dict(zip(self.NAMES, values, strict=True))
            assert named_args["is_causal"] is True
            assert named_args["p_dropout"] == named_args["softcap"] == 0.0
            assert named_args["window_size_left"] == window - 1
            starts = named_args["cu_seqlens_q"].diff()
            assert named_args["max_seqlen_q"] == starts.max()
            assert named_args["max_seqlen_k"] == named_args["seqused_k"].max()
            sizes = (named_args["block_table"], named_args["seqused_k"], starts)
            pages = (named_args[name] for name in "qkv")
            return [paged_attention(*pages, *sizes, named_args["softmax_scale"], window), None]

        named = [SimpleNamespace(name=name) for name in self.NAMES]
        varlen_fwd.default = SimpleNamespace(_schema=SimpleNamespace(arguments=named))
        library = SimpleNamespace(varlen_fwd=varlen_fwd)
        monkeypatch.setattr(fa2_peer, "loaded", lambda number: library)
        case, case_inputs, expected = self.case_and_inputs(forest, window, 16)
        for name in ("fa2", "fa2-copied"):
            assert judge(case, PREFIX[name], case_inputs, expected).failure is None

    @pytest.mark.parametrize("window", [0, 7])
    @forests
    def test_of_the_package(self, on_any_device, monkeypatch, forest, window):
        """Guards the calls of flash-attn, with pages of 256 tokens: decode and other batches.

        The signatures are those of flash-attn 2.8.3.
        """
        called = []

        def check(k, options):
            assert k.shape[1] == 256
            assert options["causal"] is True
            assert options["window_size"] == ((window - 1, 0) if window else (-1, -1))
            return options["softmax_scale"], window

        def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, block_table, **options):
            called.append("decode")
            ones = torch.ones(len(q), dtype=torch.int)
            scale_and_window = check(k_cache, options)
            tables = (block_table, cache_seqlens, ones)
            return paged_attention(q[:, 0], k_cache, v_cache, *tables, *scale_and_window)[:, None]

        def flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, block_table,
            **options,
        ):  # fmt: skip
            called.append("varlen")
            rows, lengths = cu_seqlens_q.diff(), cu_seqlens_k.diff()
            assert (max_seqlen_q, max_seqlen_k) == (rows.max(), lengths.max())
            return paged_attention(q, k, v, block_table, lengths, rows, *check(k, options))

        library = SimpleNamespace(
            flash_attn_with_kvcache=flash_attn_with_kvcache,
            flash_attn_varlen_func=flash_attn_varlen_func,
        )
        monkeypatch.setattr(fa2_peer, "loaded", lambda number: None)
        monkeypatch.setattr(fa2_peer, "imported", lambda module: library)
        case, case_inputs, expected = self.case_and_inputs(forest, window, PAGE)
        for name in ("fa2", "fa2-copied"):
            assert judge(case, PREFIX[name], case_inputs, expected).failure is None
        decodes = all(end - start == 1 for start, end, _ in case_inputs["plan"].sequences)
        assert set(called) == {"decode" if decodes else "varlen"}


class TestFastTree:
    @pytest.mark.parametrize("name", ["ragged forks", "two levels", "equal lengths"])
    def test_numbers(self, on_any_device, monkeypatch, capsys, name):
        """Guards the tree passed to FastTree: each node's tokens, parent, requests; one root."""

        def prepare(nodes, starts, batch, heads, kv_heads, dim, splits, few, fewer, params):
            print("a library that prints")  # --json must still print one document
            assert (batch, heads, kv_heads, dim) == (case_inputs["plan"].num_rows, 4, 2, 8)
            assert params.group == 2
            assert [node.id for node in nodes] == list(range(len(nodes)))
            assert [node.parent for node in nodes].count(-1) == 1 and nodes[0].parent == -1
            for node in nodes:
                children = [child for child in nodes if child.parent == node.id]
                assert node.num_children == len(children)
                if children:
                    assert sum((child.requests for child in children), []) == node.requests
                else:
                    assert len(node.requests) == 1
            return ((nodes, starts), "assignments")

        def decode(q, k, v, out, nodes, starts, q_tiles, kv_tiles, scale):
            assert (q_tiles, kv_tiles) == ([32, 8], [32, 32])
            for leaf in (node for node in nodes if not node.num_children):
                tokens, node = [], leaf
                while node is not None:
                    tokens = [*range(starts[node.id], starts[node.id] + node.seqlen), *tokens]
                    node = nodes[node.parent] if node.parent >= 0 else None
                (row,) = leaf.requests
                rows = slice(row, row + 1)
                out[rows] = attend(q[rows], k[tokens], v[tokens], scale, False)[0]

        class Params:
            def set_q_tile_sizes(self, sizes):
                self.TSQs = sizes

            def set_kv_tile_sizes(self, sizes):
                self.TSKs = sizes

            def set_kv_group_num(self, group):
                self.group = group

        library = SimpleNamespace(
            FastTreeParams=Params, fasttree_preparation=prepare, fasttree_decode=decode
        )
        monkeypatch.setenv("FASTTREE_HOME", "anywhere")
        monkeypatch.setattr(fasttree_peer, "_loaded", lambda path: library)
        case = small_case(FORESTS[name])
        case_inputs = case.inputs(0, CPU, torch.float32)
        assert (
            judge(case, PREFIX["fasttree"], case_inputs, reference(case, case_inputs)).failure
            is None
        )
        assert capsys.readouterr().out == ""

    def test_prefill_is_refused(self, on_any_device, monkeypatch):
        """Guards against requests with several rows, for which FastTree has no mask."""
        monkeypatch.setenv("FASTTREE_HOME", "anywhere")
        monkeypatch.setattr(fasttree_peer, "_loaded", lambda path: None)
        case_inputs = small_case(FORESTS["pure causal"]).inputs(0, CPU, torch.float32)
        with pytest.raises(Unavailable, match="only decode"):
            PREFIX["fasttree"](case_inputs)


class TestAbsence:
    @pytest.mark.parametrize("name", [name for name in PREFIX if name != "sdpa"])
    def test_what_cannot_run_says_why(self, name):
        """Guards the table's footer: a missing peer has a reason, in one line."""
        case_inputs = small_case([fork(8, [2, 3])], fp8=True).inputs(0, CPU, torch.float32)
        with pytest.raises(Unavailable) as reason:
            PREFIX[name](case_inputs)
        assert len(str(reason.value).splitlines()) == 1

    def test_other_libraries(self, monkeypatch):
        """Guards the reason for a named shared object that does not load, as without CUDA."""
        monkeypatch.setenv("FA3_LIBRARY", __file__)
        vllm_object.loaded.cache_clear()
        with pytest.raises(Unavailable, match="does not load") as reason:
            vllm_object.loaded(3)
        assert len(str(reason.value).splitlines()) == 1

    def test_windows_and_fp8_are_refused_where_not_offered(self):
        """Guards against comparing with a peer that computes something else."""
        window = small_case([fork(8, [2, 3])], window=4).inputs(0, CPU, torch.float32)
        with pytest.raises(Unavailable, match="window"):
            levels(window)
        fp8 = small_case([fork(8, [2, 3])], fp8=True).inputs(0, CPU, torch.float32)
        for convert in (paged, levels):
            with pytest.raises(Unavailable, match="scale"):
                convert(fp8)

    def test_arguments_follow_the_schema(self):
        """Guards FA3's calls across versions with more or fewer arguments."""
        names = [SimpleNamespace(name=name) for name in ("q", "k_new", "softcap")]
        op = SimpleNamespace(default=SimpleNamespace(_schema=SimpleNamespace(arguments=names)))
        assert vllm_object.arguments(op, fa3_peer.DEFAULTS | {"q": 1, "other": 2}) == [1, None, 0.0]


@pytest.mark.gpu
class TestGpu:
    @pytest.mark.parametrize("name", PREFIX)
    @forests
    def test_numbers(self, forest, name):
        """Guards the installed peers on the device on which they are measured."""
        case = small_case(forest, head_dim=64)
        build = partial(case.inputs.func, **case.inputs.keywords | {"page_size": 64})
        case_inputs = build(0, torch.device("cuda"), torch.bfloat16)
        expected = reference(case, case_inputs)
        try:
            verdict = judge(case, PREFIX[name], case_inputs, expected)
        except Unavailable as reason:
            pytest.skip(f"{name}: {reason}")
        assert verdict.failure is None
