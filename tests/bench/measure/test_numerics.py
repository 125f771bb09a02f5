"""The benchmark cases, their inputs, and the check of numbers."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.errors import Error, compare
from bench.inputs import plans as inputs
from bench.inputs.forests import BATCHES, PREFIXES, SUFFIXES
from bench.inputs.trees import Node, fork
from bench.measure import ops
from bench.measure.devices import DTYPES
from bench.measure.verdicts import judge, reference
from bench.suite import (
    OPS,
    cases,
    linear_quick_gelu,
    numerics_cases,
    prefix_attention,
    projector,
    qk_norm_rope,
    vision_attention,
)
from bench.suite.forms import form
from kernels.kv_pages import KVPages
from model import impls

CPU = torch.device("cpu")
FORESTS = {
    "ragged forks": [fork(130, [1, 63, 64, 65]), fork(5, [7])],
    "two levels": [Node(70, children=(fork(3, [9, 9]), fork(64, [9, 9])))],
    "pure causal": [Node(13, new=13)],
    "chunk after a prefix": [Node(100, new=37)],
    "chunk with decode": [Node(10, new=6), fork(9, [3, 2])],
    "equal lengths": [fork(64, [64] * 3)],
}


def visibility(plan):
    """For each node, which of its tokens each of its rows sees, by the definition in the plan."""
    for node in plan.nodes:
        row = torch.arange(node.row_end - node.row_start)[:, None]
        yield torch.arange(node.kv_len) < node.kv_len - node.num_new + row + 1


class TestCases:
    def test_every_op_is_covered(self):
        """Guards against an op of the model that no benchmark and no check of numbers covers."""
        assert set(OPS) >= {*impls.OPS}
        for listed in (cases("cpu"), cases("cuda"), numerics_cases()):
            assert {case.op for case in listed} == set(OPS)
            names = [(case.op, case.name) for case in listed]
            assert len(set(names)) == len(names)

    @pytest.mark.parametrize(
        "case",
        [case for case in numerics_cases() if case.op != "prefix_attention"],
        ids=lambda case: f"{case.op} {case.name}",
    )
    def test_values_are_those_of_inputs_and_results(self, case):
        """Guards the bytes in every percentage: inputs read and results written once."""
        arguments = case.inputs(0, CPU, torch.float32)
        results = form(case.op, "eager")(arguments)()
        results = results if isinstance(results, tuple) else (results,)
        if OPS[case.op].stores:
            results += arguments["pages"][:2]
        if "folded" in arguments:  # w2, b2 and w3 need not be read then
            read = [x for name, x in arguments.items() if name not in ("w2", "b2", "w3", "out")]
            arguments = dict(enumerate([*read, *arguments["folded"]]))
        tensors = [x for x in arguments.values() if torch.is_tensor(x) and x.is_floating_point()]
        count = sum(x.numel() for x in tensors)
        count += sum(x.isfinite().sum().item() for x in results if x.is_floating_point())
        # Rows that store nothing, and frequencies and log-probabilities, which are not counted.
        assert case.values == pytest.approx(count, rel=0.02)

    def test_bytes_of_a_decode_step(self):
        """Guards prefix attention's floor against the published arithmetic: per layer 4,096 bytes
        of bf16 KV per token, the prefix once."""
        case = next(case for case in cases("cuda") if case.name == "B32 P4096 S512")
        rows_bytes = 2 * 32 * 32 * 128 * 2
        assert case.bytes(torch.bfloat16) == 4096 * (4096 + 32 * 512) + rows_bytes

    def test_bytes_of_fp8_and_windows(self):
        """Guards the floors of the options: one byte an element and two scales of four bytes per
        token and KV head; of a window, the tokens that some row sees."""
        of_name = {case.name: case.bytes(torch.bfloat16) for case in cases("cuda")}
        rows_bytes = 2 * 16 * 32 * 128 * 2
        tokens = 2048 + 16 * 512
        assert of_name["B16 P2048 S512 fp8"] == 8 * 2 * (128 + 4) * tokens + rows_bytes
        assert of_name["B16 P2048 S512 window 512"] == 4096 * 16 * 512 + rows_bytes
        wide = prefix_attention.case("", [fork(100, [3, 8])], window=7)  # 4 of the prefix, 3 and 7
        assert wide.bytes(torch.bfloat16) == 4096 * (4 + 3 + 7) + 2 * 2 * 32 * 128 * 2
        assert wide.flops == 4 * (7 + 7) * 32 * 128

    def test_the_whole_grid(self):
        """Guards the grid: every point once, the most informative cases first."""
        names = [case.name for case in cases("cuda", grid=True) if case.op == "prefix_attention"]
        grid = [f"B{b} P{p} S{s}" for b in BATCHES for p in PREFIXES for s in SUFFIXES]
        assert len(grid) == 90
        assert set(grid) <= set(names)
        assert len(set(names)) == len(names)
        main_names = [case.name for case in cases("cuda") if case.op == "prefix_attention"]
        assert names[: len(main_names)] == main_names

    @pytest.mark.parametrize(
        "case",
        [
            prefix_attention.case("decode", [fork(20, [3, 5])]),
            vision_attention.case([(5, 7), (3, 4)], heads=2),
            projector.case([(5, 7), (4, 4)], width=8, out=12),
            linear_quick_gelu.case(5, 8, 12),
        ],
        ids=lambda case: case.op,
    )
    def test_flops_against_a_counter(self, case):
        """Guards the operations in every percentage against torch's own count. For the projector
        the minimum work is that of the folded form, not of its definition."""
        arguments = case.inputs(0, CPU, torch.float32)
        with FlopCounterMode(display=False) as counter:
            form(case.op, "portable" if case.op == "projector" else "eager")(arguments)()
        assert case.flops == counter.get_total_flops()

    def test_views_of_the_model(self):
        """Guards the sizes of vision cases: the views of a photo of 1920 x 1080 pixels, and of the
        largest image that is not downscaled."""
        tokens = {
            (case.op, case.name): len(case.inputs.keywords["grids"])
            for case in cases("cuda")
            if "grids" in case.inputs.keywords
        }
        for op, name in (("vision_attention", "H16 D96"), ("projector", "C1536")):
            assert tokens[op, f"8x 36x36 + 1x 52x52 {name}"] == 9
            assert tokens[op, f"36x 36x36 + 1x 52x52 {name}"] == 37
            assert tokens[op, f"1x 52x52 {name}"] == tokens[op, f"1x 36x36 {name}"] == 1
        rows = [case.name for case in cases("cuda") if case.op == "linear_quick_gelu"]
        assert rows == [f"T{tokens} C1536 F8960" for tokens in (52**2, 8 * 36**2 + 52**2)]

    @pytest.mark.parametrize("forest", FORESTS.values(), ids=FORESTS)
    def test_flops_count_what_rows_see(self, forest):
        """Guards causal rows: a counter would count the hidden half as work."""
        plan = inputs.prefix_plan(0, "cpu", forest=forest)
        seen = sum(int(sees.sum()) for sees in visibility(plan))
        assert prefix_attention.case("", forest).flops == 4 * seen * 32 * 128


class TestInputs:
    def test_repeatable_and_private(self):
        """Guards against errors and times that cannot be reproduced, and inputs that change the
        global random state."""
        state = torch.get_rng_state()
        for case in numerics_cases():
            first, again, other = (case.inputs(s, CPU, torch.float32) for s in (0, 0, 1))
            for name, value in first.items():
                if isinstance(value, (torch.Tensor, KVPages)):
                    torch.testing.assert_close(value, again[name], rtol=0, atol=0, equal_nan=True)
            name = next(n for n, value in first.items() if torch.is_tensor(value))
            assert not torch.equal(first[name], other[name])
        assert torch.equal(torch.get_rng_state(), state)

    def test_unowned_slots_are_nan(self):
        """Guards the trap for a kernel that reads past a node's end, or from an unowned page."""
        arguments = prefix_attention.inputs(
            0, CPU, torch.float32, forest=[fork(9, [1, 4])], kv_heads=2, head_dim=8, page_size=4
        )
        plan, k = arguments["plan"], arguments["pages"].k
        owned = torch.zeros(plan.num_pages, 4, dtype=torch.bool)
        for node in plan.nodes:
            for token in range(node.kv_len):
                owned[node.pages[token // 4], token % 4] = True
        assert torch.equal(k.isfinite(), owned[:, None, :, None].expand_as(k))
        fp8 = prefix_attention.inputs(
            0, CPU, torch.float32, forest=[fork(9, [1, 4])], page_size=4, fp8=True
        )["pages"]
        assert fp8.k.dtype == fp8.v.dtype == torch.float8_e4m3fn
        for x, scale in ((fp8.k, fp8.k_scale), (fp8.v, fp8.v_scale)):
            assert torch.equal(scale.isfinite().all(1), owned)
            assert torch.equal(x.float().isfinite().all(3).all(1), owned)
        assert owned.sum() == 14
        assert plan.num_pages > 5
        assert list(plan.nodes[0].pages) != sorted(plan.nodes[0].pages)

    def test_slots_of_qk_norm_rope(self):
        """Guards against two rows that write one slot, and against pages that hide a missing store:
        they hold NaN before."""
        arguments = qk_norm_rope.inputs(0, CPU, torch.float32, rows=67, skip=3)
        slots = arguments["slots"]
        assert (slots[:3] == -1).all()
        assert len(slots[3:].unique()) == 64
        assert arguments["pages"].k.isnan().all()
        assert arguments["pages"].v.isnan().all()


class TestNumerics:
    def test_error_is_relative_to_row_and_scale(self):
        """Guards the measure: |error| over max(rms(reference), |reference|)."""
        expected = torch.tensor([3.0, 4.0, 0.0, 0.0])  # rms 2.5
        error = compare(expected + torch.tensor([0.3, 0.0, 0.5, 0.0]), expected)
        assert error.max == pytest.approx(0.2)
        assert error.rms == pytest.approx(math.sqrt((0.1**2 + 0.2**2) / 4))

    @pytest.mark.parametrize(
        ("result", "expected"),
        [
            ([math.nan, 1.0], [0.0, 1.0]),
            ([0.0, 1.0], [math.nan, 1.0]),
            ([math.inf, 1.0], [-math.inf, 1.0]),
            ([math.inf, 1.0], [math.nan, 1.0]),
        ],
    )
    def test_nan_and_inf_must_be_in_the_same_places(self, result, expected):
        """Guards against NaN, for which every comparison is false, passing as a small error."""
        assert compare(torch.tensor(result), torch.tensor(expected)).max == math.inf

    def test_equal_nan_and_inf_pass(self):
        """Guards results that rightly hold NaN or inf, such as the pages of qk_norm_rope."""
        x = torch.tensor([math.nan, math.inf, -math.inf, 2.0])
        assert compare(x, x) == Error(0, 0)
        assert compare(x[:3], x[:3]) == Error(0, 0)
        assert compare(x[:0], x[:0]) == Error(0, 0)

    def test_integers_are_right_or_wrong(self):
        """Guards tokens: 151,935 instead of 151,936 is no rounding error."""
        error = compare(torch.tensor([7, 8, 9, 9]), torch.tensor([7, 8, 9, 10]))
        assert (error.max, error.rms) == (1, 0.5)

    def test_wrong_shape_or_kind_is_an_error(self):
        """Guards against broadcasting in the comparison, and tokens given as floats."""
        with pytest.raises(ValueError, match="shape"):
            compare(torch.ones(3, 1), torch.ones(3))
        with pytest.raises(ValueError, match="float"):
            compare(torch.ones(3), torch.ones(3, dtype=torch.int64))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("case", numerics_cases(), ids=lambda case: f"{case.op} {case.name}")
    def test_all_forms_pass(self, case, dtype):
        """Guards every op in every dtype against the eager definition in fp32."""
        for row in ops.check_case(case, CPU, dtype):
            assert row["failure"] is None, row["impl"]

    @pytest.mark.parametrize("op", OPS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_small_fault_fails(self, op, dtype):
        """Guards the tolerances: an error of twelve roundoffs in 16 bits, or of 2^-14 in fp32, must
        fail."""
        case = next(case for case in numerics_cases() if case.op == op)
        fault = 12 * torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 2**-14

        def faulty(arguments):
            def call():
                result = form(op, "eager")(arguments)()
                first, *rest = result if isinstance(result, tuple) else (result,)
                if op == "sample":
                    return first, rest[0] * (1 + fault)
                return (first * (1 + fault), *rest)

            return call

        arguments = case.inputs(0, CPU, dtype)
        assert "error" in judge(case, faulty, arguments, reference(case, arguments)).failure

    def test_reference_is_fp32(self):
        """Guards the judge: a reference in the form's own dtype would share its roundings."""
        case = next(case for case in numerics_cases() if case.op == "silu_mul")
        arguments = case.inputs(0, CPU, torch.bfloat16)
        (expected,) = reference(case, arguments)
        assert expected.dtype == torch.float32
        assert judge(case, form(case.op, "eager"), arguments, [expected]).max_err > 2**-10

    def test_reference_is_unfolded(self):
        """Guards the projector's definition: a reference with folded weights would share the fold's
        rounding, and one that mixes fp32 with 16 bits would not run."""
        case = next(case for case in numerics_cases() if case.op == "projector")
        arguments = case.inputs(0, CPU, torch.bfloat16)
        (expected,) = reference(case, arguments)
        assert arguments["folded"][0].dtype == torch.bfloat16, "judging must leave the inputs alone"
        wrong = arguments | {"folded": tuple(2 * x for x in arguments["folded"])}
        assert torch.equal(reference(case, wrong)[0], expected)
        assert judge(case, form(case.op, "portable"), wrong, [expected]).failure
        assert judge(case, form(case.op, "portable"), arguments, [expected]).failure is None

    def test_rows_without_a_result_stay_untouched(self):
        """Guards the text's embeddings, between which the projector writes those of the images."""
        case = next(case for case in numerics_cases() if case.name.endswith("scattered"))
        arguments = case.inputs(0, CPU, torch.float32)
        expected = reference(case, arguments)
        right = form(case.op, "eager")
        assert judge(case, right, arguments, expected).failure is None

        def careless(x):
            return lambda: right(x)().nan_to_num_(0.0)

        assert judge(case, careless, arguments, expected).max_err == math.inf

    def test_unwritten_results_fail(self):
        """Guards against memory that happens to hold the right result of the previous form."""
        case = next(case for case in numerics_cases() if case.op == "quick_gelu")
        arguments = case.inputs(0, CPU, torch.float32)
        expected = reference(case, arguments)
        verdict = judge(case, lambda x: lambda: torch.empty_like(x["x"]), arguments, expected)
        assert verdict.max_err == math.inf

    def test_results_written_in_place_count(self):
        """Guards the KV store: the rotated Q alone says nothing about what went to the pages."""
        case = next(case for case in numerics_cases() if case.op == "qk_norm_rope")
        arguments = case.inputs(0, CPU, torch.float32)
        expected = reference(case, arguments)

        def no_store(x):
            return form(case.op, "eager")(x | {"slots": torch.full_like(x["slots"], -1)})

        assert judge(case, no_store, arguments, expected).max_err == math.inf
        assert arguments["pages"].k.isnan().all(), "judging must leave the inputs as they were"
        assert judge(case, form(case.op, "eager"), arguments, expected).failure is None


def narrowed(case):
    """The case with fewer heads or nodes if the interpreter would take long.

    Queries per KV head, row tiles and kernels stay the same. smollm2's cases have several KV heads.
    """
    attends = case.op in ("prefix_attention", "rotary_attention")
    if not attends or case.name.startswith("smollm2"):
        return case
    fewer = {"heads": 4, "kv_heads": 1}
    if case.name.startswith("64/1"):
        fewer = {"forest": (fork(130, [1, 9]), Node(20, new=2))}
    return replace(case, inputs=partial(case.inputs, **fewer))


# Other modes differ in what is launched, not in what is computed: one case per op tests them.
FIRST_WITH_MODES = {case.op: case for case in reversed(numerics_cases()) if case.modes}.values()


class TestInterpreter:
    @pytest.mark.usefixtures("interpreter")
    @pytest.mark.parametrize(
        ("case", "name"),
        [
            pytest.param(narrowed(case), name, id=f"{case.op} {case.name} {name}")
            for case in numerics_cases()
            for name in ("triton", *(case.modes if case in FIRST_WITH_MODES else ()))
        ],
    )
    def test_bf16_triton_forms_pass(self, case, name):
        """Guards every Triton form in the GPUs' dtype on machines without a GPU."""
        arguments = case.inputs(0, CPU, torch.bfloat16)
        assert (
            judge(case, form(case.op, name), arguments, reference(case, arguments)).failure is None
        )


@pytest.mark.gpu
class TestGpu:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("case", numerics_cases(), ids=lambda case: f"{case.op} {case.name}")
    def test_all_forms_pass(self, case, dtype):
        """Guards every op in every dtype, bf16 above all, on the device that it is for."""
        for row in ops.check_case(case, torch.device("cuda"), dtype):
            assert row["failure"] is None, row["impl"]
