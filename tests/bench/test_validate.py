"""`bench validate`: the fp64 references agree with the definitions, and wrong forms are found."""

import json
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench import __main__ as command
from bench.errors import Error, compare, roundoff
from bench.measure import verdicts as numerics
from bench.rows import jsonl
from bench.suite import forms, numerics_cases
from bench.validate import command as validate
from bench.validate import fp64, histogram, timm_judge
from bench.validate import model as validate_model
from bench.validate.comparison import EDGES, compare_result
from bench.validate.model import ModelSetup
from model.errors import InputError

CPU = torch.device("cpu")
SMALL = ("--op", "rms_norm", "--shape", "T1 C97 alone")


def run(*words: str) -> int:
    return command.main(["validate", *words])


@pytest.fixture
def planted_error(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The portable form of rms_norm with one element of its result half a percent off."""
    original = forms.form
    values = SimpleNamespace()

    def form(op, name):
        def prepare(inputs):
            def call():
                result = original(op, name)(inputs)()
                if name == "portable":
                    values.right = result[0, 41].item()
                    result[0, 41] *= 1.005
                    values.wrong = result[0, 41].item()
                return result

            return call

        return prepare

    monkeypatch.setattr(validate, "form", form)
    return values


@pytest.fixture(scope="module")
def half() -> ModelSetup:
    return ModelSetup(CPU, torch.float16)


def uninstall(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    """Make `library` impossible to import, and forget that it was imported before."""
    timm_judge._eva.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)

    def find_spec(name, path=None, target=None):
        if name == library:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=find_spec), *sys.meta_path])


@pytest.mark.parametrize("case", numerics_cases(), ids=lambda case: f"{case.op} {case.name}")
def test_fp64_agrees_with_the_definition(case):
    """Guards the references against a wrong formula, and one that rounds to fp32 in between."""
    inputs = case.inputs(0, CPU, torch.float32)
    expected = fp64.reference(case, inputs)
    results = numerics.results(case, forms.form(case.op, "eager"), inputs)
    for result, exact in zip(results, expected, strict=True):
        assert exact.dtype in (torch.float64, torch.int64)
        error = compare(result, exact)
        assert error.max < 5e-6
        assert error.rms < (1e-6 if case.op != "sample" else 5e-6)
        if error.max:  # then the reference is not representable in fp32
            assert not torch.equal(exact.float().nan_to_num().double(), exact.nan_to_num())


def test_references_do_not_modify_inputs():
    """Guards against pages that the reference has filled before a form is called."""
    case = next(case for case in numerics_cases() if case.op == "qk_norm_rope")
    inputs = case.inputs(0, CPU, torch.float32)
    fp64.reference(case, inputs)
    assert inputs["pages"].k.isnan().all()


def test_a_planted_error_is_found(planted_error, tmp_path, capsys):
    """Guards the reported position and values of the worst element, and the exit code."""
    assert run(*SMALL, "--dtype", "fp32", "--json", "--out", str(tmp_path)) == 1
    eager, portable = json.loads(capsys.readouterr().out)["rows"]
    assert (eager["failure"], eager["skipped"]) == (None, None)
    assert portable["impl"] == "portable"
    assert portable["worst_index"] == [0, 41]
    assert portable["worst_got"] == planted_error.wrong
    assert portable["worst_expected"] == pytest.approx(planted_error.right, rel=1e-6)
    assert portable["worst_expected"] != planted_error.right, "expected is in fp64"
    where = f"y[0, 41] is {planted_error.wrong!r}, not {portable['worst_expected']!r}"
    assert portable["failure"].startswith("max error")
    assert portable["failure"].endswith(where)
    # 0.5 % of an element is 83,886 roundoffs; relative to the row's RMS at most that many.
    assert sum(portable["histogram"]) == sum(eager["histogram"]) == 97
    far = int(np.searchsorted(EDGES, portable["max_err"] / 2**-24, side="right"))
    assert portable["histogram"][far] == 1
    assert EDGES[far - 1] > 1000
    assert sum(eager["histogram"][far - 5 :]) == 0


def test_the_table_names_what_failed(planted_error, capsys):
    """Guards the terminal output: it names the failing row and prints both values in full."""
    assert run(*SMALL, "--dtype", "fp32") == 1
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("FAILED"))
    assert line.startswith("FAILED: rms_norm, T1 C97 alone, portable, float32, fp64: max error")
    assert repr(planted_error.wrong) in line


def test_right_forms_pass(capsys):
    """Guards against limits that correct forms exceed, and the fields of a row."""
    ops = ("rms_norm", "sample", "qk_norm_rope", "layer_norm", "projector")
    assert run("--op", *ops, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {(row["op"], row["impl"], row["dtype"]) for row in rows} == {
        (op, impl, dtype)
        for op in ops
        for impl in ("eager", "portable")
        for dtype in ("bfloat16", "float16", "float32")
    }
    for row in rows:
        assert row["reference"] == "fp64"
        assert row["failure"] is row["skipped"] is None
        assert row["rms_err"] <= row["max_err"] <= row["max_allowed"]
        assert 0 <= row["beyond_roundoff"] <= 1
        assert {"case", "device", "commit", "torch", "worst_got"} <= row.keys()


def test_a_broken_form_hides_no_other(monkeypatch, capsys):
    """Guards the rest of a run against the first form that raises."""
    original = forms.form

    def form(op, name):
        if name == "eager":
            return lambda inputs: partial(torch.ones(2).view, 3)
        return original(op, name)

    monkeypatch.setattr(validate, "form", form)
    assert run(*SMALL, "--dtype", "fp16", "--json") == 1
    broken, portable = json.loads(capsys.readouterr().out)["rows"]
    assert broken["failure"].startswith("RuntimeError: shape '[3]' is invalid")
    assert portable["failure"] is None


def test_a_missing_result_fails(monkeypatch, capsys):
    """Guards against a form that returns only one of its two results and passes."""
    monkeypatch.setattr(validate, "form", lambda op, name: lambda inputs: lambda: inputs["q"])
    words = ("--op", "prefix_attention", "--shape", "smollm2", "--impl", "eager")
    assert run(*words, "--dtype", "fp32", "--json") == 1
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["failure"].startswith("ValueError: zip()")


@pytest.mark.judge
def test_a_broken_model_hides_no_other(half, monkeypatch):
    """Guards the rest of a run against a model that raises in one form."""
    case = validate_model.CASES[0]
    original = validate_model._ours

    def ours(case, setup, form):
        return original(case, setup, form if form == "portable" else 1 / 0)

    monkeypatch.setattr(validate_model, "_ours", ours)
    rows = validate_model.verdicts(case, half, ("eager", "portable"), libraries=False)
    failures = {form: fields["failure"] for form, _, fields in rows}
    assert failures == {"eager": "ZeroDivisionError: division by zero", "portable": None}


def test_wrong_tokens_and_nan_count():
    """Guards the errors of tokens and of misplaced NaN, which are not multiples of a roundoff."""
    tokens = compare_result("tokens", torch.tensor([5, 7]), torch.tensor([5, 8]), Error(0, 0))
    assert (tokens.index, tokens.got, tokens.expected, tokens.beyond_roundoff) == ((1,), 7, 8, 0.5)
    assert tokens.histogram[0] == tokens.histogram[-1] == 1
    assert tokens.failure == "max error 1.00e+00 exceeds 0.00e+00: tokens[1] is 7, not 8"
    nan = torch.tensor([[1.0, torch.nan], [torch.nan, 2.0]])
    expected = torch.tensor([[1.0, torch.nan], [3.0, 2.0]]).double()
    pages = compare_result("pages", nan, expected, Error(1, 1))
    assert pages.index == (1, 0)
    assert sum(pages.histogram) == 3, "NaN where it belongs is no element to count"
    assert pages.histogram[-1] == 1
    assert "pages[1, 0] is nan, not 3.0" in pages.failure


def test_the_result_nearest_its_limit_is_shown(monkeypatch, capsys):
    """Guards against missing a wrong fp32 log-sum-exp, whose error is below 16-bit rounding."""
    original = forms.form

    def form(op, name):
        def prepare(inputs):
            def call():
                out, lse = original(op, name)(inputs)()
                lse[3, 1] *= 1 + 2**-12
                return out, lse

            return call

        return prepare

    monkeypatch.setattr(validate, "form", form)
    words = ("--op", "prefix_attention", "--shape", "smollm2", "--impl", "eager")
    assert run(*words, "--dtype", "bf16", "--json") == 1
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["result"], row["worst_index"]) == ("lse", [3, 1])
    assert row["max_err"] < roundoff(torch.bfloat16)


@pytest.mark.judge
class TestModel:
    """The whole model."""

    @pytest.mark.parametrize("case", validate_model.CASES, ids=lambda case: case.name)
    def test_all_agree(self, case, half):
        """Guards the fp64 model and the limits in 16 bits: correct forms pass."""
        rows = list(validate_model.verdicts(case, half, ("eager", "portable"), libraries=True))
        (library,) = case.libraries
        patched = [f"{library} with {form}" for form in ("eager", "portable")]
        assert [row[:2] for row in rows] == [
            (x, "fp64") for x in ("eager", "portable", library, *patched)
        ]
        for _, _, fields in rows:
            assert fields["failure"] is None
            assert 0 < fields["rms_err"] < 4 * roundoff(torch.float16)

    def test_libraries_agree_in_fp32(self):
        """Guards against a mistake that forms and fp64 model share: libraries do not have it."""
        setup = ModelSetup(CPU, torch.float32)
        for case in validate_model.CASES:
            rows = list(validate_model.verdicts(case, setup, ("portable",), libraries=True))
            (library,) = case.libraries
            assert [row[:2] for row in rows] == [
                ("portable", "fp64"),
                (library, "fp64"),
                ("portable", library),
                (f"{library} with portable", "fp64"),
            ]
            assert all(fields["max_err"] < 2e-5 for _, _, fields in rows)

    def test_a_wrong_patch_fails(self, half, monkeypatch):
        """Guards the rows of patched libraries: they are the patched model's, and are judged."""
        monkeypatch.setattr("model.hf.text.silu_mul", lambda x, **options: x.chunk(2, dim=1)[1])
        rows = validate_model.verdicts(validate_model.CASES[0], half, ("portable",), libraries=True)
        failures = {form: fields["failure"] for form, _, fields in rows}
        assert "error" in failures.pop("transformers with portable")
        assert set(failures.values()) == {None}

    @pytest.mark.parametrize("fault", ["model.norm.weight", "lm_head.weight"])
    def test_a_small_fault_fails(self, fault, half):
        """Guards the limits in 16 bits: one weight tensor that is 0.25 % too large must fail."""
        case = validate_model.CASES[0]
        wrong = SimpleNamespace(model=half.model, ids=half.ids)
        wrong.exact, wrong.rounded = half.exact, half.rounded  # of the right weights
        weight = half.model.checkpoint_tensors()[fault]
        before = weight.clone()
        weight.mul_(1.0025)
        try:
            (_, _, fields), *_ = validate_model.verdicts(case, wrong, ("eager",), libraries=False)
        finally:
            weight.copy_(before)
        assert "error" in fields["failure"]

    def test_without_the_libraries(self, half, monkeypatch):
        """Guards GPU nodes with torch alone: a missing library is skipped by name, not failed."""
        uninstall(monkeypatch, "transformers")
        uninstall(monkeypatch, "timm")
        for case in validate_model.CASES:
            rows = list(validate_model.verdicts(case, half, ("eager",), libraries=True))
            (library,) = case.libraries
            assert [row[:2] for row in rows] == [("eager", "fp64"), (library, "fp64")]
            assert rows[1][2]["skipped"] == f"{library} is not installed"
            assert rows[0][2]["failure"] is rows[1][2]["failure"] is None

    def test_skipped_libraries_are_printed(self, monkeypatch, capsys):
        """Guards against output that hides that a library was not compared with."""
        uninstall(monkeypatch, "transformers")
        assert run("--op", "model", "--shape", "decoder", "--dtype", "fp32") == 0
        text = capsys.readouterr().out
        assert "skipped: transformers is not installed (transformers: 1 case)" in text


class TestPictures:
    """The pictures of `--out`."""

    def test_they_show_something(self, tmp_path, capsys):
        """Guards against an empty picture: it has each form's line and the limit."""
        image = pytest.importorskip("matplotlib.image")
        folder = tmp_path / "new" / "folder"
        assert run(*SMALL, "--out", str(folder)) == 0
        assert "picture: " in capsys.readouterr().out
        names = {path.name for path in folder.glob("*.png")}
        assert jsonl.read(folder / "validate.jsonl"), "rows are saved"
        assert names == {f"errors-{x}.png" for x in ("bfloat16", "float16", "float32")}
        pixels = image.imread(folder / "errors-float32.png")[..., :3]
        orange = np.array([1.0, 127 / 255, 14 / 255])  # the second form's colour
        assert (np.abs(pixels - orange).max(-1) < 0.02).sum() > 200
        assert (pixels.max(-1) < 0.2).sum() > 200

    def test_one_wrong_element_shows(self, planted_error, tmp_path):
        """Guards the axes: one element of many in the last bins must be visible."""
        pytest.importorskip("matplotlib")
        rows = list(validate.validate(CPU, ops=["rms_norm"], dtypes=[torch.float32]))
        figures = []
        plots = histogram.pyplot()
        close, plots.close = plots.close, figures.append
        try:
            histogram.draw(rows, tmp_path)
        finally:
            plots.close = close
        panel = figures[0].axes[0]
        lines = {patch.get_label(): patch.get_data() for patch in panel.patches}
        close(figures[0])
        values, edges, _ = lines["portable"]
        assert edges[:-1][values > 0].max() > 1000
        assert values[values > 0].min() > panel.get_ylim()[0]
        values, edges, _ = lines["eager"]
        assert edges[:-1][values > 0].max() < 16

    def test_without_matplotlib(self, monkeypatch, tmp_path):
        """Guards against minutes of work that end in a traceback: matplotlib is checked first."""
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.setattr(validate, "validate", None)
        with pytest.raises(InputError, match="pip install matplotlib"):
            run(*SMALL, "--out", str(tmp_path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--op", "softmax"), "unknown op 'softmax'; choose one of prefix_attention, .*, model"),
        (("--impl", "fast"), "unknown form 'fast'; choose one of eager, portable, triton, triton-"),
        (("--dtype", "int8"), "unknown dtype 'int8'; choose one of"),
        (("--op", "sample", "--shape", "B9"), "no case has 'B9' in its name; choose one of 'B3 V"),
        (("--op", "sample", "--impl", "triton-fused"), "none of the selected cases has the form"),
        (("--impl", "triton", "--dtype", "bf16"), "interpreter multiplies bfloat16 wrongly"),
    ],
)
def test_mistakes_are_named(request, words, message):
    """Guards against tracebacks, and against an empty run that passes."""
    if "triton" in words:
        request.getfixturevalue("interpreter")
    with pytest.raises(InputError, match=message):
        run(*words, "--device", "cpu")


def test_triton_in_its_interpreter(triton_device, capsys):
    """Guards Triton's forms on a CPU, where their bf16, which is wrong there, is skipped."""
    words = (*SMALL, "--impl", "triton", "--json", "--device", triton_device)
    assert run(*words) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["dtype"] for row in rows] == ["bfloat16", "float16", "float32"]
    assert [bool(row["skipped"]) for row in rows] == [triton_device == "cpu", False, False]
    assert all(row["max_err"] > 0 for row in rows if not row["skipped"])
