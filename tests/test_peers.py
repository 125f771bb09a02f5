"""The comparators: what can be checked of them without their libraries; an absent one is named."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from bench import cases as cases_module
from bench import inputs, peers
from bench.inputs import Node, fork
from bench.numerics import judge, reference
from bench.peers import PEERS, PREFIX, Unavailable, fa3_peer, flashinfer_peer, layout, sdpa_peer
from bench.peers.flex_peer import flex
from bench.peers.layout import levels, paged
from tests.errors import max_error

CPU = torch.device("cpu")
PAGE = 4
FORESTS = {
    "ragged forks": [fork(130, [1, 63, 64, 65]), fork(5, [7])],
    "two levels": [Node(70, children=(fork(3, [9, 9]), fork(64, [9, 9])))],
    "pure causal": [Node(13, new=13)],
    "chunk behind a prefix": [Node(100, new=37)],
    "chunk beside decode": [Node(10, new=6), fork(9, [3, 2])],
    "equal lengths": [fork(64, [64] * 3)],
    # Rows of a parent beside those of its children; a depth of one, two and three in one batch.
    "parent and children": [
        Node(9, new=3, children=(Node(4, new=2), Node(5, children=(Node(0), Node(3, new=3))))),
        Node(6, new=1),
    ],
}
forests = pytest.mark.parametrize("forest", FORESTS.values(), ids=FORESTS)


def small_case(forest, head_dim=8, **options):
    """A prefix_attention case of 4/2 heads on pages of 4 tokens."""
    case = cases_module._prefix("test", forest, heads=(4, 2, head_dim), **options)
    build = partial(case.inputs.func, **case.inputs.keywords | {"page_size": PAGE})
    return cases_module.Case(case.op, case.name, build, case.values, case.flops)


def attend(q, k, v, scale, causal, window=0):
    """q [m, Hq, D] over gathered k, v [n, Hkv, D], rows at the end; out, lse [m, Hq]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("mhd,nhd->mhn", q, k) * scale
    behind = torch.arange(len(k)) - (len(k) - len(q)) - torch.arange(len(q))[:, None]
    hidden = (behind > 0) & causal | (behind <= -window if window else False)
    scores = scores.masked_fill(hidden[:, None], -torch.inf)
    return torch.einsum("mhn,nhd->mhd", scores.softmax(-1), v), scores.logsumexp(-1)


def gathered(pool, segment):
    """The tokens that a segment's block table names [length, Hkv, D]."""
    return pool[segment.pages.long()].transpose(1, 2).flatten(0, 1)[: segment.length]


class TestTorch:
    @pytest.mark.parametrize("window", [0, 7])
    @forests
    def test_every_row_attends_to_what_it_sees(self, forest, window):
        """Guards the baselines: a comparator that attends to less than it should is easily beaten
        and proves nothing."""
        case = small_case(forest, window=window)
        made = case.inputs(0, CPU, torch.float32)
        expected = reference(case, made)
        for peer in (PEERS["sdpa"], PEERS["sdpa-reuse"], partial(flex, compiled=False)):
            verdict = judge(case, peer, made, expected)
            assert verdict.failure is None, peer

    def test_sdpa_takes_the_cheapest_mask(self):
        """Guards the baseline's speed: a needless mask keeps SDPA off its fast kernels."""

        def masking(forest):
            plan = inputs.prefix_plan(0, "cpu", forest=forest)
            return sdpa_peer._masking(sdpa_peer._padded(plan, 2, CPU)[2])

        assert masking(FORESTS["equal lengths"]) == {}
        assert masking(FORESTS["pure causal"]) == {"is_causal": True}
        assert masking(FORESTS["chunk behind a prefix"]).keys() == {"attn_mask"}


class TestLayout:
    @pytest.mark.parametrize("window", [0, 7])
    @pytest.mark.parametrize("copied", [False, True])
    @forests
    def test_block_tables(self, forest, copied, window):
        """Guards every paged peer: its tables hold each sequence's tokens in their order."""
        case = small_case(forest, window=window)
        made = case.inputs(0, CPU, torch.float32)
        (expected,) = reference(case, made)
        given = dict(made, k_pages=made["k_pages"].clone(), v_pages=made["v_pages"].clone())
        found = paged(given, copied=copied)
        assert found.k.isfinite().all()
        out = torch.full_like(made["q"], torch.nan)
        for s in found.segments:
            k, v = gathered(found.k, s), gathered(found.v, s)
            out[s.start : s.end], _ = attend(
                made["q"][s.start : s.end], k, v, made["scale"], True, window
            )
        assert max_error(out, expected) < 1e-5
        pages = torch.cat([segment.pages for segment in found.segments])
        if copied:
            assert len(pages.unique()) == len(pages) == len(found.k)

    def test_full_pages_are_shared(self):
        """Guards the baseline that engines have: only a page filled in part is rebuilt."""
        made = small_case([fork(4 * PAGE + 1, [2, 9])]).inputs(0, CPU, torch.float32)
        found = paged(made)
        first, second = found.segments
        assert first.pages[:4].tolist() == list(made["plan"].nodes[0].pages[:4])
        assert first.pages[:4].tolist() == second.pages[:4].tolist()
        assert len(found.k) == len(made["k_pages"]) + 1 + 3
        whole = small_case([fork(4 * PAGE, [2, 9])]).inputs(0, CPU, torch.float32)
        assert paged(whole).k is whole["k_pages"], "nothing to rebuild, nothing to copy"

    @forests
    def test_levels(self, forest):
        """Guards the cascades: merged over the levels, every row has seen its path once."""
        case = small_case(forest)
        made = case.inputs(0, CPU, torch.float32)
        (expected,) = reference(case, made)
        tree = levels(made)
        outs, lses = [], []
        for segments in tree:
            assert segments[0].start == 0
            assert [s.end for s in segments[:-1]] == [s.start for s in segments[1:]]
            assert segments[-1].end == made["plan"].num_rows
            out = torch.zeros_like(made["q"])
            lse = made["q"].new_full(made["q"].shape[:2], -torch.inf)
            for s in (s for s in segments if s.length):
                k, v = gathered(made["k_pages"], s), gathered(made["v_pages"], s)
                out[s.start : s.end], lse[s.start : s.end] = attend(
                    made["q"][s.start : s.end], k, v, made["scale"], segments is tree[-1]
                )
            outs.append(out)
            lses.append(lse.T)
        assert max_error(fa3_peer.merge(tuple(outs), tuple(lses)), expected) < 1e-5

    def test_a_prefix_is_one_segment(self):
        """Guards what a cascade is for: the shared node once for all its rows, in each group."""
        made = small_case([fork(8, [2, 3]), fork(9, [4])]).inputs(0, CPU, torch.float32)
        first, last = levels(made)
        assert [(s.start, s.end, s.length) for s in first] == [(0, 2, 8), (2, 3, 9)]
        assert [(s.start, s.end, s.length) for s in last] == [(0, 1, 2), (1, 2, 3), (2, 3, 4)]

    def test_tables_of_flashinfer(self):
        """Guards indptr, indices and the tokens in the last page, from 1 to a full page, 0 of
        nothing."""
        pages = [torch.tensor(ids, dtype=torch.int32) for ids in ([7, 3], [5], [], [1, 2])]
        segments = [
            layout.Segment(row, row + 1, ids, length)
            for row, (ids, length) in enumerate(zip(pages, (5, 4, 0, 8), strict=True))
        ]
        starts, indices, lasts = flashinfer_peer._tables(segments, PAGE)
        assert starts.tolist() == [0, 2, 3, 3, 5]
        assert indices.tolist() == [7, 3, 5, 1, 2]
        assert lasts.tolist() == [1, 4, 0, 4]
        assert flashinfer_peer._rows(segments).tolist() == [0, 1, 2, 3, 4]
        assert layout.block_table(segments).tolist() == [[7, 3], [5, 0], [0, 0], [1, 2]]
        for tensor in (starts, indices, lasts, layout.block_table(segments)):
            assert tensor.dtype == torch.int32


class TestAbsence:
    @pytest.mark.parametrize(
        "name", [name for name in PREFIX if name not in ("sdpa", "sdpa-reuse")]
    )
    def test_what_cannot_run_says_why(self, name):
        """Guards the table's footer: a peer that is missing has a reason, in one line."""
        made = small_case([fork(8, [2, 3])], fp8=True).inputs(0, CPU, torch.float32)
        with pytest.raises(Unavailable) as reason:
            PEERS[name](made)
        assert len(str(reason.value).splitlines()) == 1

    def test_windows_and_fp8_are_refused_where_not_offered(self):
        """Guards against a peer that is compared while it computes something else."""
        window = small_case([fork(8, [2, 3])], window=4).inputs(0, CPU, torch.float32)
        with pytest.raises(Unavailable, match="window"):
            levels(window)
        fp8 = small_case([fork(8, [2, 3])], fp8=True).inputs(0, CPU, torch.float32)
        for of in (paged, levels):
            with pytest.raises(Unavailable, match="scale"):
                of(fp8)

    def test_version(self, monkeypatch):
        """Guards the versions beside the rows."""
        monkeypatch.setattr(peers, "installed", lambda package: f"1.2 of {package}")
        assert peers.version("flashinfer-copied") == "flashinfer-python 1.2 of flashinfer-python"
        assert peers.version("fa3") == "vllm 1.2 of vllm"
        assert peers.version("fa2-varlen-alone") == "flash_attn 1.2 of flash_attn"
        assert peers.version("sdpa") is peers.version("triton") is None
        assert peers.version("torch-varlen") is peers.version("cudnn-folded") is None

    def test_arguments_follow_the_schema(self):
        """Guards FA3's calls across versions, whose ops have more or fewer arguments."""
        names = [SimpleNamespace(name=name) for name in ("q", "k_new", "softcap")]
        op = SimpleNamespace(default=SimpleNamespace(_schema=SimpleNamespace(arguments=names)))
        assert fa3_peer.arguments(op, fa3_peer.OFF | {"q": 1, "other": 2}) == [1, None, 0.0]


@pytest.mark.gpu
class TestGpu:
    @pytest.mark.parametrize("name", PREFIX)
    @forests
    def test_numbers(self, forest, name):
        """Guards the baselines on the device where they matter, those that are installed."""
        case = small_case(forest, head_dim=64)
        build = partial(case.inputs.func, **case.inputs.keywords | {"page_size": 64})
        made = build(0, torch.device("cuda"), torch.bfloat16)
        expected = reference(case, made)
        try:
            verdict = judge(case, PEERS[name], made, expected)
        except Unavailable as reason:
            pytest.skip(f"{name}: {reason}")
        assert verdict.failure is None
