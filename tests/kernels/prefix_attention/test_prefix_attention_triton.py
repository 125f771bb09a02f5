"""The Triton form of prefix attention: trees, tile edges, options, and invariance.

A toy GPU with few SMs and grains of a few tokens put the edges of work ranges everywhere: inside
pages, between heads, at the ends of tiles. Memory that a kernel leaves unwritten holds NaN.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.inputs.plans import quantised
from bench.inputs.trees import Node as InputNode
from bench.inputs.trees import fork
from bench.suite.prefix_attention import inputs as prefix_attention_inputs
from kernels.kv_pages import KVPages
from kernels.plan_node import PlanNode
from kernels.prefix_attention import prefix_attention
from kernels.prefix_plan import PrefixPlan
from kernels.runtime.configs import Gpu, assume_gpu, use_config
from tests.support.errors import max_error
from tests.support.prefix_trees import SWITCHES, brute_force, lay_out, pools, trees

PAGE = 16  # the smallest that the kernel takes
BF16 = pytest.param(torch.bfloat16, id="bf16")
# 16 bits: four roundoffs of the dtype, including those of a probability and of the result.
FP32, FP16 = 4e-6, 2**-9
TOLERANCES = {torch.float32: FP32, torch.float16: FP16, torch.bfloat16: 2**-6}


@pytest.fixture(autouse=True)
def unwritten_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, params=["old", "new"])
def form(request):
    """Every test runs with all switches of the kernel off, and with all on."""
    with use_config("prefix_attention", **dict.fromkeys(SWITCHES, int(request.param == "new"))):
        yield request.param


def toy(sms: int = 5) -> Gpu:
    return Gpu("toy", arch=90, sms=sms, shared_bytes=227 * 1024)


def run(sms: int = 5, grain: int = 4, overhead: int = 1, **inputs) -> Tensor:
    """The Triton form on a toy GPU with one program per SM."""
    config = {"programs": 1, "grain": grain, "overhead": overhead, **inputs.pop("config", {})}
    with assume_gpu(toy(sms)), use_config("prefix_attention", **config):
        return prefix_attention(**inputs, impl="triton")


def inputs_of(device: str, forest: list, dtype: torch.dtype = torch.float32, **shape) -> dict:
    shape = {"heads": 8, "kv_heads": 2, "head_dim": 16, "page_size": PAGE} | shape
    return prefix_attention_inputs(0, device, dtype, forest=forest, return_lse=True, **shape)


def check(inputs: dict, exact: float = FP32, **options) -> None:
    """Output and log-sum-exp against the definition."""
    expected = prefix_attention(**inputs, impl="eager")
    for result, target in zip(run(**inputs, **options), expected, strict=True):
        wide = result.dtype == torch.float32
        assert max_error(result, target) < (exact if wide else TOLERANCES[result.dtype])


@settings(max_examples=16, deadline=None, derandomize=True)
@given(
    roots=st.lists(trees(3, PAGE, most_new=3), min_size=1, max_size=2),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    window=st.sampled_from([0, 0, 9]),
    invariant=st.booleans(),
    sms=st.sampled_from([1, 4, 7]),
)
def test_random_trees(triton_device, roots, heads, window, invariant, sms):
    """Guards one to three levels, several groups, empty and one-token nodes, page edges, parents
    written in the same step as children, 3 heads per KV head (rows do not fill a tile), any number
    of SMs."""
    nodes, rows, num_pages = lay_out(roots, PAGE)
    q = torch.randn(rows, heads[0], 16, generator=torch.Generator().manual_seed(1))
    pages = pools(nodes, num_pages, heads[1], 16, PAGE)
    plan = PrefixPlan.build(
        nodes, num_rows=rows, num_pages=num_pages, page_size=PAGE, device=triton_device
    )
    expected = brute_force(q, pages, nodes, 0.3, window)
    results = run(
        sms,
        grain=16 if invariant else 4,
        overhead=0 if invariant else 1,
        q=q.to(triton_device),
        pages=pages.map(lambda x: x.to(triton_device)),
        plan=plan,
        scale=0.3,
        window=window,
        batch_invariant=invariant,
        return_lse=True,
    )
    for result, target in zip(results, expected, strict=True):
        assert max_error(result.cpu(), target) < FP32


FORESTS = {
    "one rollout": [fork(33, [17])],
    "4 rollouts: 16 vectors, the small tile": [fork(20, [1, 15, 16, 17])],
    "5 rollouts: one row beyond it": [fork(20, [3] * 5)],
    "17 rollouts: beyond the tile of 64": [fork(19, [2] * 17)],
    "33 rollouts: beyond the tile of 128": [fork(5, [1] * 33)],
    "several groups": [fork(31, [1, 2]), fork(0, [5]), fork(48, [7, 16, 31])],
    "prefill": [InputNode(37, new=37)],
    "prefill over two tiles of 128": [InputNode(41, new=41)],
    "chunk of a prefill after a prefix": [InputNode(70, new=19)],
    "several tokens per rollout": [
        InputNode(33, children=(InputNode(9, new=3), InputNode(20, new=2)))
    ],
    "prefill with decode": [InputNode(23, new=23), fork(33, [5, 20]), InputNode(0)],
    "synthesis prompt below an image": [
        InputNode(29, children=(InputNode(21, new=21, children=(InputNode(1, new=1),)),))
    ],
}


@pytest.mark.parametrize("forest", FORESTS.values(), ids=FORESTS.keys())
def test_forests(triton_device, forest):
    """Guards tiles of 16, 64 and 128 vectors and one row more, and each kind of step."""
    check(inputs_of(triton_device, forest, heads=4, kv_heads=1))


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
@pytest.mark.parametrize("name", ["one rollout", "several groups", "prefill with decode"])
def test_half_precision(triton_device, name, dtype):
    """Guards fp32 partials, and the rounding of tiles that a single program finishes."""
    check(inputs_of(triton_device, FORESTS[name], dtype, heads=4, kv_heads=1))


def test_both_sizes_and_several_kv_heads(triton_device):
    """Guards the order of the work line: the larger tiles first, and within a size by KV head."""
    check(inputs_of(triton_device, [fork(40, [1, 3, 17]), fork(20, [2])], heads=18, kv_heads=3))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_head_dims(triton_device, head_dim):
    """Guards the head_dims that models have."""
    check(inputs_of(triton_device, [fork(20, [3, 18])], head_dim=head_dim), sms=2)


def test_one_kv_head_of_64(triton_device):
    """Guards Step-3's shape: a single rollout fills a tile of 64."""
    inputs = inputs_of(triton_device, [fork(20, [18])], heads=64, kv_heads=1, head_dim=32)
    check(inputs, sms=3)


def test_windows(triton_device):
    """Guards windows of one token, of a page, across nodes and beyond the sequence, over one plan.

    Each window starts tiles at its own grains, so it needs its own schedule.
    """
    forest = [fork(33, [1, 18, 40]), InputNode(50, new=6)]
    inputs = inputs_of(triton_device, forest, heads=4)
    for window in (1, 16, 17, 1000):
        check(inputs | {"window": window})


def test_tensor_copies(triton_device):
    """Guards TMA: whole blocks by descriptors; NaN after a node's end must not enter."""
    config = {"tma": 1, "block": 16}
    check(inputs_of(triton_device, [fork(37, [1, 16, 23])]), config=config, grain=16)


def test_blocks_smaller_than_pages(triton_device):
    """Guards KV blocks that are a part of a page."""
    inputs = inputs_of(triton_device, [fork(70, [1, 40])], page_size=64)
    check(inputs, config={"block": 16}, grain=8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, BF16])
@pytest.mark.parametrize(
    ("arch", "sizes"), [(80, (1.0, 1.0)), (90, (1.0, 1.0)), (90, (1.0, 1e-3)), (90, (1e5, 1e-3))]
)
def test_fp8_pages(triton_device, arch, sizes, dtype):
    """Guards both ways to read e4m3; unused slots and scales are NaN.

    In fp16 a weight times the scale of small values would be subnormal, and large queries infinite.
    """
    inputs = inputs_of(triton_device, [fork(37, [1, 16, 23])], dtype)
    if sizes[0] > 1 and dtype == torch.float16:
        pytest.skip("fp16 has no such queries")
    inputs["q"] = (
        (inputs["q"] * sizes[0]).bfloat16().to(dtype)
    )  # so that products in fp16 are exact
    k, v, *_ = inputs["pages"]
    inputs["pages"] = quantised(KVPages(k / sizes[0], v * sizes[1]))
    gpu = Gpu("toy", arch, sms=5, shared_bytes=163 * 1024)
    with assume_gpu(gpu), use_config("prefix_attention", programs=1, grain=4, pdl=0):
        out, lse = prefix_attention(**inputs, impl="triton")
    expected = prefix_attention(**inputs, impl="eager")
    assert max_error(out, expected[0]) < max(FP16, TOLERANCES[dtype])
    assert max_error(lse, expected[1]) < FP32


def test_large_scores(triton_device):
    """Guards scores in the hundreds: every partial and every merge must subtract its maximum.

    The weights inherit the scores' own fp32 roundoff, 2^-24 of about 500.
    """
    inputs = inputs_of(triton_device, [fork(37, [1, 16, 23])]) | {"scale": 40.0}
    check(inputs, exact=500 * 2**-24)


def test_rows_that_see_nothing(triton_device):
    """Guards rows of no node, or only of empty ones: zeros and -inf, also next to other rows."""
    nodes = [PlanNode([], 0, 0, 2), PlanNode([1], 5, 2, 3)]
    plan = PrefixPlan.build(nodes, num_rows=4, num_pages=2, page_size=PAGE, device=triton_device)
    ones = torch.ones(2, 1, PAGE, 16, device=triton_device)
    q = torch.ones(4, 1, 16, device=triton_device)
    out, lse = run(q=q, pages=KVPages(ones, ones), plan=plan, scale=1.0, return_lse=True)
    seen = torch.tensor([0.0, 0.0, 1.0, 0.0], device=triton_device)
    torch.testing.assert_close(out, seen[:, None, None].expand_as(out), rtol=FP32, atol=0)
    assert lse[:, 0].tolist() == [-math.inf, -math.inf, pytest.approx(16 + math.log(5)), -math.inf]


def test_no_rows_and_no_nodes(triton_device):
    """Guards an empty step."""
    plan = PrefixPlan.build([], num_rows=0, num_pages=1, page_size=PAGE, device=triton_device)
    ones = torch.ones(1, 1, PAGE, 16, device=triton_device)
    q = torch.ones(0, 1, 16, device=triton_device)
    assert run(q=q, pages=KVPages(ones, ones), plan=plan, scale=1.0).shape == (0, 1, 16)


def test_a_wrong_page_is_noticed(triton_device):
    """Guards the tests themselves: a wrong entry of the page table must show."""
    inputs = inputs_of(triton_device, [fork(37, [1, 16, 23])])
    inputs["pages"] = inputs["pages"].map(torch.nan_to_num)
    expected = prefix_attention(**inputs, impl="eager")[0]
    assert max_error(run(**inputs)[0], expected) < FP32
    inputs["plan"].pages[1] = inputs["plan"].pages[0]
    assert max_error(run(**inputs)[0], expected) > 1e-2


def test_inputs_are_only_read(triton_device):
    """Guards queries and pages against writes."""
    inputs = inputs_of(triton_device, [fork(37, [1, 16, 23])])
    tensors = (inputs["q"], *inputs["pages"][:2])
    before = [x.clone() for x in tensors]
    run(**inputs)
    for x, old in zip(tensors, before, strict=True):
        assert torch.equal(x.nan_to_num(7.0), old.nan_to_num(7.0))


@pytest.mark.usefixtures("steady_products")
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("switch", ["ahead", "pieces"])
def test_a_switch_keeps_the_bits(triton_device, form, switch, invariant):
    """Guards switches that change how keys are found, but not the rows or the order of reads."""
    inputs = inputs_of(triton_device, [fork(40, [1, 3, 17]), fork(20, [2])], heads=12, kv_heads=2)
    options = {"grain": 16, "batch_invariant": True} if invariant else {}
    switched = {"split": 0, switch: int(form == "old")}
    both = [run(**inputs, **options, config=config) for config in ({"split": 0}, switched)]
    for result, same in zip(*both, strict=True):
        assert torch.equal(result, same)


@pytest.mark.usefixtures("steady_products")
class TestBatchInvariance:
    """A rollout's bits are the same alone, in any batch, at any row and on another GPU."""

    LENGTHS = (1, 16, 23, 40)

    def rows(self, device: str, rollouts: list[int], **options) -> dict[int, Tensor]:
        """Outputs of these rollouts, which share a prefix of 53 tokens, by rollout."""
        k = torch.randn((4 + 3 * 4, 2, PAGE, 16), generator=torch.Generator().manual_seed(0))
        pages = KVPages(k, k.flip(1).contiguous()).map(lambda x: x.to(device))
        q = torch.randn((4, 4, 16), generator=torch.Generator().manual_seed(1))[rollouts].to(device)
        nodes = [PlanNode([3, 1, 0, 2], 53, 0, len(rollouts))]
        for row, rollout in enumerate(rollouts):
            own = [4 + 3 * rollout + index for index in range(3)]
            nodes.append(PlanNode(own, self.LENGTHS[rollout], row, row + 1, 1))
        plan = PrefixPlan.build(
            nodes, num_rows=len(rollouts), num_pages=len(k), page_size=PAGE, device=device
        )
        out = run(q=q, scale=0.3, pages=pages, plan=plan, **options)
        return dict(zip(rollouts, out, strict=True))

    @pytest.mark.parametrize("grain", [16, 48])
    @pytest.mark.parametrize("window", [0, 30])
    def test_bits(self, triton_device, window, grain):
        """Guards chunks of one block, and of several, whose order matters."""
        options = {"batch_invariant": True, "grain": grain, "overhead": 0, "window": window}
        together = self.rows(triton_device, [0, 1, 2, 3], **options)
        for rollouts, sms in (([3], 5), ([0], 4), ([2, 0], 3), ([3, 2, 1, 0], 7)):
            for rollout, out in self.rows(triton_device, rollouts, sms=sms, **options).items():
                assert torch.equal(out, together[rollout]), (rollouts, rollout)

    def test_the_fastest_mode_differs_slightly(self, triton_device):
        """Guards the point of the mode: the fastest mode is as accurate, but its bits do change."""
        together = self.rows(triton_device, [0, 1, 2, 3])
        others = [self.rows(triton_device, [rollout], sms=3)[rollout] for rollout in range(4)]
        assert all(max_error(out, together[index]) < FP32 for index, out in enumerate(others))
        assert any(not torch.equal(out, together[index]) for index, out in enumerate(others))

    def test_prefill_and_decode_agree(self, triton_device):
        """Guards a token's row in a prefill: it is the row of its decode step."""
        inputs = inputs_of(triton_device, [InputNode(41, new=41)], heads=2, kv_heads=1)
        inputs |= {"batch_invariant": True, "return_lse": False}
        whole = run(**inputs, grain=16, overhead=0)
        plan, pages = inputs["plan"], inputs["plan"].nodes[0].pages
        for length in (1, 16, 17, 33, 41):
            one = PrefixPlan.build(
                [PlanNode(pages, length, 0, 1, 1)],
                num_rows=1,
                num_pages=plan.num_pages,
                page_size=PAGE,
                device=triton_device,
            )
            step = inputs | {"plan": one, "q": inputs["q"][length - 1 : length]}
            assert torch.equal(run(**step, grain=16, overhead=0)[0], whole[length - 1]), length

    def test_overhead_is_ignored(self, triton_device):
        """Guards chunks against a table's `overhead`: they are cut at fixed positions."""
        inputs = inputs_of(triton_device, [fork(37, [1, 16])])
        expected = prefix_attention(**inputs, impl="eager")
        results = run(**inputs, batch_invariant=True, grain=16, overhead=1)
        for result, target in zip(results, expected, strict=True):
            assert max_error(result, target) < FP32

    def test_other_forms_refuse(self, triton_device):
        """Guards against an impl that ignores the option."""
        with pytest.raises(ValueError, match="batch_invariant: only impl 'triton'"):
            inputs = inputs_of(triton_device, [fork(5, [1])])
            prefix_attention(**inputs, batch_invariant=True, impl="portable")


def test_bad_input(triton_device):
    """Guards the checks before a launch: each message names the caller's argument."""
    forest = [fork(5, [1, 2])]
    good = inputs_of(triton_device, forest)
    for inputs, message in (
        (good | {"q": good["q"].double()}, "pages must be torch.float64 like q"),
        (good | {"q": good["q"].transpose(0, 1).contiguous().transpose(0, 1)}, "q must be contig"),
        (inputs_of(triton_device, forest, head_dim=12), "head_dim 12"),
        (inputs_of(triton_device, forest, page_size=8), "page_size 8"),
        (inputs_of(triton_device, forest, heads=129, kv_heads=1), "129 query heads per KV head"),
        (good | {"window": -1}, "window must be"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 1500])
def test_bits_of_real_shapes(window):
    """Guards sums against chunk boundaries: the interpreter, which sums in order, cannot show
    it."""
    inputs = prefix_attention_inputs(
        0, "cuda", torch.bfloat16, forest=[fork(2048, range(100, 1700, 100))], window=window
    )
    plan = inputs["plan"]
    together = prefix_attention(**inputs, batch_invariant=True)
    for row in (0, 7, 15):
        prefix, leaf = plan.nodes[0], plan.nodes[1 + row]
        alone = PrefixPlan.build(
            [PlanNode(prefix.pages, 2048, 0, 1), PlanNode(leaf.pages, leaf.kv_len, 0, 1, 1)],
            num_rows=1,
            num_pages=plan.num_pages,
            page_size=plan.page_size,
            device="cuda",
        )
        one = inputs | {"plan": alone, "q": inputs["q"][row : row + 1]}
        assert torch.equal(prefix_attention(**one, batch_invariant=True)[0], together[row]), row


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 16, 64])
def test_real_shapes(dtype, batch):
    """Guards what the interpreter cannot show: tensor cores, races, the GPU's own configs."""
    inputs = prefix_attention_inputs(
        0, "cuda", dtype, forest=[fork(2048, range(100, 100 + batch))], return_lse=True
    )
    expected = prefix_attention(**inputs, impl="eager")
    out, lse = prefix_attention(**inputs, impl="triton")
    assert max_error(out, expected[0]) < TOLERANCES[torch.bfloat16]
    assert max_error(lse, expected[1]) < 1e-4
    for _ in range(2):  # a race or a missing wait would show in some runs
        again = prefix_attention(**inputs, impl="triton")
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)
