"""`python -m bench`: the op table, the decode step, the rows, and a user's mistakes."""

import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import triton
from torch.utils.flop_counter import FlopCounterMode

import kernels
from bench import __main__ as command
from bench.cli import commands
from bench.cli.measurement import Measurement
from bench.inputs.trees import fork
from bench.measure import ops, roofline, timing
from bench.measure import origin as rows
from bench.measure.poison import PoisonedError
from bench.peers.peer import Unavailable
from bench.peers.sdpa_peer import sdpa
from bench.rows import jsonl, show
from bench.studies import decode
from bench.studies.decode import DecodeCase, forms_on, time_decode
from bench.suite import OPS, PEERS, cases, numerics_cases, prefix_attention
from kernels.errors import ImplError
from model.config import PRESETS
from model.errors import InputError
from model.step3vl import Step3VL
from tests.pacore_sched.answers.test_journal import disk_of

CPU = torch.device("cpu")
FIELDS = [
    "op",
    "case",
    "impl",
    "device",
    "dtype",
    "p20_us",
    "median_us",
    "p80_us",
    "bytes",
    "flops",
]
FIELDS += ["roofline_pct", "max_err", "rms_err", "commit"]


@pytest.fixture
def quick(monkeypatch):
    """Few repeats, for tests that do not check the times."""
    monkeypatch.setattr(timing, "MAX_REPEATS", timing.MIN_REPEATS)


class TestOps:
    def test_wrong_numbers_are_not_timed(self, quick, monkeypatch, capsys):
        """Guards against a fast form that is fast because it is wrong."""
        op = OPS["quick_gelu"]

        def wrong(x, *, impl):
            return op.run(x, impl=impl) * (1.01 if impl == "portable" else 1)

        monkeypatch.setitem(OPS, "quick_gelu", replace(op, run=wrong))
        monkeypatch.setattr(commands, "cases", lambda kind, grid: numerics_cases())
        code = command.main(["ops", "--op", "quick_gelu", "--device", "cpu", "--json"])
        eager, portable = json.loads(capsys.readouterr().out)["rows"]
        assert code == 1
        assert eager["failure"] is None
        assert eager["median_us"] > 0
        assert "exceeds" in portable["failure"]
        assert portable["max_err"] == pytest.approx(0.01, rel=0.01)
        assert portable["median_us"] is None

    def test_a_broken_form_does_not_hide_the_others(self, quick, monkeypatch):
        """Guards the table against one form that raises, when checked or when timed."""
        op = OPS["quick_gelu"]
        calls = {"portable": 0}

        def breaking(x, *, impl):
            calls[impl] = calls.get(impl, 0) + 1
            if impl == "portable" and calls["portable"] > allowed:
                raise RuntimeError("out of luck\nsecond line")
            return op.run(x, impl=impl)

        monkeypatch.setitem(OPS, "quick_gelu", replace(op, run=breaking))
        case = next(case for case in numerics_cases() if case.op == "quick_gelu")
        for allowed in (0, 1):  # noqa: B007 (read by `breaking`)
            calls.clear()
            calls["portable"] = 0
            by_impl = {row["impl"]: row for row in ops.time_case(case, CPU, torch.float32)}
            assert by_impl["portable"]["failure"] == "RuntimeError: out of luck"
            assert by_impl["portable"]["median_us"] is None
            assert by_impl["eager"]["failure"] is None
            assert by_impl["eager"]["median_us"] > 0

    def test_a_peer_that_cannot_be_timed_does_not_stop_the_forms(self, quick, monkeypatch, capsys):
        """Guards our own times against a library that fails during capture, and the table against a
        peer or a case that is left out silently."""

        def absent(inputs):
            raise Unavailable("not installed")

        calls = {"sdpa": 0}

        def breaking(inputs):
            call = sdpa(inputs)

            def counted():
                calls["sdpa"] += 1
                if calls["sdpa"] > 2:  # checked and prepared, then it breaks
                    raise RuntimeError("not under capture")
                return call()

            return counted

        peers = PEERS["prefix_attention"]
        for name, prepare in (("sdpa", breaking), ("fa3", absent)):
            monkeypatch.setitem(peers, name, replace(peers[name], prepare=prepare))
        monkeypatch.setattr(ops, "sets_for", lambda *_: 1)
        case = prefix_attention.case("small", [fork(5, [2, 3])], peers=("sdpa", "fa3"))
        rows = ops.time_case(case, CPU, torch.float32)
        by_impl = {row["impl"]: row for row in rows}
        assert by_impl["sdpa"]["failure"] == "RuntimeError: not under capture"
        assert by_impl["sdpa"]["max_err"] < 1e-5
        assert by_impl["fa3"]["skipped"] == "not installed"
        assert by_impl["fa3"]["failure"] is None
        for name in ("eager", "portable"):
            assert by_impl[name]["median_us"] > 0
            assert by_impl[name]["skipped"] is None
        show.times(rows)
        show.errors(rows)
        assert capsys.readouterr().out.count("skipped: fa3: not installed\n") == 2

    def test_a_case_that_does_not_fit_says_what_it_needs(self, monkeypatch, capsys):
        """Guards against the largest points vanishing, or ending the run, on a smaller GPU."""
        case = next(case for case in cases("cuda", grid=True) if case.name == "B64 P32768 S32768")
        monkeypatch.setattr(ops, "sets_for", lambda *_: 1)
        needed = ops.needed_bytes(case, CPU, torch.bfloat16)
        assert 4 * case.bytes(torch.bfloat16) < needed < 5 * case.bytes(torch.bfloat16)
        monkeypatch.setattr(ops, "_too_large", lambda *_: "needs 29 GB, the GPU has 24")
        (row,) = ops.time_case(case, CPU, torch.bfloat16)
        assert (row["skipped"], row["failure"]) == ("needs 29 GB, the GPU has 24", None)
        show.times([row])
        assert "needs 29 GB, the GPU has 24 (B64 P32768 S32768)" in capsys.readouterr().out

    def test_rows(self, quick, capsys, tmp_path):
        """Guards the public row: its fields, its JSON as the last line, the same rows in a file."""
        file = tmp_path / "new" / "rows.jsonl"
        arguments = ["--op", "rms_norm", "--shape", "T1", "--device", "cpu", "--json"]
        assert command.main(["ops", *arguments, "--out", str(file)]) == 0
        document = json.loads(capsys.readouterr().out.splitlines()[-1])
        eager = next(row for row in document["rows"] if row["impl"] == "eager")
        assert set(FIELDS) <= eager.keys()
        assert eager["op"] == "rms_norm"
        assert eager["dtype"] == "float32"
        assert eager["p20_us"] <= eager["median_us"] <= eager["p80_us"]
        floor = max(
            eager["bytes"] / eager["copy_gb_s"] / 1e3, eager["flops"] / eager["gemm_tflop_s"] / 1e6
        )
        assert eager["roofline_pct"] == pytest.approx(100 * floor / eager["median_us"])
        assert eager["speedup"] == 1
        assert jsonl.read(file) == document["rows"]

    def test_tables(self, quick, monkeypatch, capsys):
        """Guards the printed tables, failed rows included."""
        case = next(case for case in numerics_cases() if case.op == "quick_gelu")
        table_rows = ops.time_case(case, CPU, torch.float32)
        table_rows[1] |= {"failure": "max error 1 exceeds 0", "median_us": None}
        show.times(table_rows)
        show.errors(table_rows)
        printed = capsys.readouterr().out
        assert printed.count("FAILED: max error 1 exceeds 0") == 1
        assert f"FAILED: quick_gelu, {case.name}, portable, float32: max error" in printed
        assert "roofline of float32: copy" in printed

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["ops", "--op", "softmax"], "unknown op 'softmax'; choose one of prefix_attention, "),
            (["ops", "--op", "rms_norm", "--shape", "T7777"], "'T16 C4096'"),
            (["ops", "--device", "tpu"], "choose one of cpu, cuda"),
            (
                ["numerics", "--op", "sample", "--out", "/proc/no/such"],
                "cannot write /proc/no/such",
            ),
        ],
    )
    def test_mistakes(self, arguments, message):
        """Guards the one-line message for a user's mistake."""
        with pytest.raises(InputError, match=message):
            command.main(arguments)

    def test_missing_impl(self, monkeypatch):
        """Guards against a form requested by name being silently replaced or left out."""
        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
        with pytest.raises(ImplError, match="triton"):
            command.main(["numerics", "--op", "rms_norm", "--impl", "triton", "--device", "cpu"])


class TestDecode:
    def test_floor_of_the_10b(self):
        """Guards the floor of a decode step: 15.14 GB of weights, 147,456 bytes per token."""
        config = PRESETS["step3-vl-10b"].decoder
        case = DecodeCase(batch=32, prefix=8192, suffix=512)
        kv = 147_456 * (8192 + 32 * 512)
        weights = case.bytes(config, torch.bfloat16) - kv - 32 * 4096 * 2
        assert weights == 2 * (36 * 192_946_432 + 4096 + 151_936 * 4096)
        assert weights / 1e9 == pytest.approx(15.14, abs=0.005)

    def test_rows(self, quick):
        """Guards the step itself: the forms agree, and the model is not left in the slow one."""
        model = Step3VL.from_preset("tiny")
        step_rows = time_decode(model, DecodeCase(3, 70, 5), names=forms_on("cuda"))
        assert [row["impl"] for row in step_rows] == ["eager", "default", "default, FP8 KV"]
        assert [row["case"] for row in step_rows] == ["tiny B3 P70 S5"] * 3
        assert step_rows[0]["speedup"] == 1
        assert step_rows[1]["max_err"] < step_rows[2]["max_err"], "the third has FP8 pages"
        config = model.config.decoder
        saved = 3 * config.kv_bytes_per_token(1) - 8 * config.layers * config.kv_heads
        assert step_rows[1]["bytes"] - step_rows[2]["bytes"] == (70 + 3 * 5) * saved
        assert 0 < step_rows[1]["max_err"] < 1e-4, "the default is not the eager form on a CPU"
        assert set(model.impl.values()) == {None}

    def test_flops(self, quick, monkeypatch):
        """Guards the step's operations against torch's own count, which leaves out the norms."""
        monkeypatch.setattr(decode, "FORMS", {"eager": "eager"})
        model, case = Step3VL.from_preset("tiny"), DecodeCase(3, 70, 5)
        roofline.roofline(CPU, torch.float32)
        with FlopCounterMode(display=False) as counter:
            time_decode(model, case)
        calls = 2 + 1 + timing.MIN_REPEATS  # expected and error, warm-up, repeats
        counted = counter.get_total_flops() / calls
        assert case.flops(model.config.decoder) == pytest.approx(counted, rel=0.002)


def test_a_poisoned_process_keeps_its_rows(tmp_path, monkeypatch, capsys):
    """Guards rows measured before a form poisoned the process: they are on disk and in the tables,
    one line names the form, and the exit code is 1."""

    def run(options: object, device: torch.device) -> Iterator[dict]:
        yield {"op": "sample", "failure": None}
        raise PoisonedError("triton", RuntimeError("CUDA error: an illegal memory access"))

    shown: list[dict] = []
    failing = Measurement(run, lambda made: shown.extend(made))
    monkeypatch.setattr(commands, "ROOFLINE", failing)
    out = tmp_path / "rows.jsonl"
    assert command.main(["roofline", "--device", "cpu", "--out", str(out)]) == 1
    assert jsonl.read(out) == shown == [{"op": "sample", "failure": None}]
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: triton: RuntimeError: CUDA error: an illegal memory access: ")
    assert "profiles record" in stderr and stderr.count("\n") == 1


class TestRows:
    def test_interrupted_write_is_cut_off(self, tmp_path):
        """Guards a record whose process was killed in the middle of a line: the rest must stay
        readable."""
        file = tmp_path / "rows.jsonl"
        jsonl.append(file, [{"a": 1}])
        with file.open("a") as text:
            text.write('{"a": 2, "b')
        assert jsonl.read(file) == [{"a": 1}]
        jsonl.append(file, [{"a": 3}])
        assert jsonl.read(file) == [{"a": 1}, {"a": 3}]

    def test_a_whole_last_row_is_kept(self, tmp_path):
        """Guards a row that an editor saved without a newline: it was deleted as incomplete."""
        file = tmp_path / "rows.jsonl"
        file.write_text('{"a": 1}\n{"a": 2}')
        jsonl.append(file, [{"a": 3}])
        assert file.read_text() == '{"a": 1}\n{"a": 2}\n{"a": 3}\n'

    def test_a_cut_loses_nothing_else(self, tmp_path):
        """Guards the rows before an incomplete one: while the file was rewritten, a killed process
        or a full disk lost them all."""
        file = tmp_path / "rows.jsonl"
        file.write_text('{"a": 1}\n{"a": 2, "b')
        with disk_of(4), pytest.raises(InputError, match="cannot write"):
            jsonl.append(file, [{"a": 3}])
        assert jsonl.read(file) == [{"a": 1}]

    @pytest.mark.parametrize(
        "content", [b"# Notes\n\nmore", b"notes", b"\x89PNG\r\n\x1a\n\0", b"\n"]
    )
    def test_other_files_are_left_alone(self, tmp_path, content):
        """Guards `--out notes.md`: the last line of any file was cut off, and rows were added."""
        file = tmp_path / "notes.md"
        file.write_bytes(content)
        with pytest.raises(InputError, match="notes.md is no file of rows: choose another"):
            jsonl.append(file, [{"a": 1}])
        assert file.read_bytes() == content

    def test_a_wrong_out_is_found_before_measuring(self, tmp_path, monkeypatch):
        """Guards minutes of measurements, of which the first row found the file unfit."""
        monkeypatch.setattr(commands, "ROOFLINE", Measurement(pytest.fail, print))
        (tmp_path / "notes.md").write_text("notes")
        with pytest.raises(InputError, match="is no file of rows"):
            command.main(["roofline", "--device", "cpu", "--out", str(tmp_path / "notes.md")])

    @pytest.mark.parametrize("line", ["{", "[1]", ""])
    def test_other_content_is_named(self, tmp_path, line):
        """Guards against silently losing rows from a file that was edited by hand."""
        file = tmp_path / "rows.jsonl"
        file.write_text(f'{{"a": 1}}\n{line}\n{{"a": 2}}\n')
        with pytest.raises(InputError, match=r"rows\.jsonl:2"):
            jsonl.read(file)

    def test_recorded_rows_do_not_make_the_commit_dirty(self, tmp_path, monkeypatch):
        """Guards a run whose rows are tracked: after the first row that it adds, processes started
        later would name another commit, and none of its rows would be found again."""
        monkeypatch.setattr(rows, "ROOT", tmp_path)
        code, recorded = tmp_path / "code.py", tmp_path / "profiles" / "results" / "rows.jsonl"
        recorded.parent.mkdir(parents=True)
        who = ("-c", "user.name=a", "-c", "user.email=b")
        for path in (code, recorded):
            path.write_text("a\n")
        for words in (["init"], ["add", "."], [*who, "commit", "-m", "c"]):
            subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True)
        commit = rows.commit.__wrapped__
        recorded.write_text("a\nb\n")
        assert not commit().endswith("+dirty")
        code.write_text("b\n")
        assert commit().endswith("+dirty")

    def test_commit(self, tmp_path, monkeypatch):
        """Guards the commit of a row: that of our checkout, not of a repository around a wheel,
        where it is the code's version and hash; and the mark for uncommitted changes."""
        monkeypatch.setattr(rows, "ROOT", tmp_path)
        monkeypatch.delenv("GIT_COMMIT", raising=False)
        commit = rows.commit.__wrapped__

        def git(*arguments):
            who = ("-c", "user.name=a", "-c", "user.email=a@b")
            subprocess.run(
                ["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True
            )

        (tmp_path / "file").write_text("one")
        git("init")
        git("add", "file")
        git("commit", "-m", "one")
        assert len(commit()) == 12
        (tmp_path / "file").write_text("two")
        assert commit().endswith("+dirty")
        monkeypatch.setattr(rows, "ROOT", tmp_path / "site-packages")
        rows.ROOT.mkdir()
        assert re.fullmatch(rf"{re.escape(kernels.__version__)}\+[0-9a-f]{{12}}", commit())
        monkeypatch.setenv("GIT_COMMIT", "abc")
        assert commit() == "abc"


@pytest.mark.gpu
class TestGpu:
    def test_rows(self):
        """Guards the whole path of a row on a GPU."""
        case = next(case for case in cases("cuda") if case.op == "silu_mul")
        for row in ops.time_case(case, torch.device("cuda"), torch.bfloat16, budget_s=0.2):
            assert row["failure"] is None
            assert row["timer"] == "graph"
            assert row["driver"]
