"""Filters, lists, reproduction commands, decode steps by part, and the pytest front end."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as command
from bench.cli import commands
from bench.measure import ops, timing
from bench.measure import origin as rows
from bench.rows import jsonl, repro, show
from bench.rows.schema import SCHEMA
from bench.studies import breakdown, decode
from bench.studies.decode import DecodeCase
from bench.studies.prefill import PrefillCase
from bench.suite import OPS, cases, numerics_cases
from bench.suite.forms import forms_of, select
from kernels.runtime.spans import span
from model.config import PRESETS
from model.errors import InputError
from model.terminal import Parser

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch):
    """Few repeats."""
    monkeypatch.setattr(timing, "MAX_REPEATS", timing.MIN_REPEATS)


def output_of(capsys, *arguments):
    assert command.main([*arguments, "--device", "cpu"]) == 0
    return capsys.readouterr().out


class TestFilters:
    def test_an_exact_name_selects_one_case(self):
        """Guards a command for one row against running every case whose name contains it."""
        all_cases = cases("cuda")
        assert [c.name for c in select(all_cases, shape="prefill 2048")] == ["prefill 2048"]
        assert len(select(all_cases, shape="prefill 204")) == 3

    def test_forms(self):
        """Guards `--impl`: cases without the form are left out, and peers can be selected."""
        selected = select(cases("cpu"), impls=["sdpa"])
        assert {case.op for case in selected} == {"prefix_attention"}
        assert forms_of(selected[0], ["cudnn", "sdpa", "eager"]) == ("sdpa", "eager")

    def test_dtypes(self, capsys):
        """Guards `--dtype`, by long and short names, against being ignored."""
        out = output_of(
            capsys, "numerics", "--op", "rms_norm", "--dtype", "bf16", "float16", "--list"
        )
        assert "bfloat16" in out
        assert "float16" in out
        assert "float32" not in out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["ops", "--impl", "fa9"], "unknown form 'fa9'; choose one of eager, portable, triton"),
            (["ops", "--op", "sample", "--impl", "flex"], "none of these cases has a form 'flex'"),
            (["numerics", "--dtype", "int4"], "unknown dtype 'int4'; choose one of bfloat16"),
            (["decode", "--model", "gpt-5"], "unknown model 'gpt-5'; choose one of "),
            (["decode", "--model", "tiny", "--prefix", "9000"], "the context of tiny has 8,192"),
            (["decode", "--batch", "many"], "--batch: 'many' is not an integer from 1 to"),
            (["frobnicate"], "invalid choice: 'frobnicate'"),
        ],
    )
    def test_mistakes(self, arguments, message):
        """Guards the one-line message for a user's mistake."""
        with pytest.raises(InputError, match=message):
            command.main(
                [*arguments, "--device", "cpu"] if arguments[0] != "frobnicate" else arguments
            )


def test_the_default_command_sets_every_option():
    """Guards `python -m bench`, which runs several commands: each finds all of its options."""
    together = Parser()
    commands.ALL.add_arguments(together)
    options = vars(together.parse_args([]))
    for part in commands.ALL.parts:
        alone = Parser()
        part.add_arguments(alone)
        missing = set(vars(alone.parse_args([]))) - set(options) - {"list", "repro"}
        assert not missing


class TestDryRuns:
    def test_list(self, capsys):
        """Guards `--list`: every case with its forms, and nothing measured."""
        listed = json.loads(output_of(capsys, "ops", "--list", "--json"))["cases"]
        assert [row["case"] for row in listed] == [case.name for case in cases("cpu")]
        first = listed[0]
        assert first["impls"] == ["eager", "portable", "sdpa"]
        assert first["bytes"] == cases("cpu")[0].bytes(torch.float32)

    def test_repro_makes_the_same_row(self, quick, capsys):
        """Guards the command of a row: run as printed, it measures that row."""
        out = output_of(capsys, "ops", "--op", "rms_norm", "--shape", "T16", "--repro")
        lines = out.splitlines()
        assert len(lines) == 2
        words = shlex.split(lines[1])
        assert words[:3] == ["python", "-m", "bench"]
        rows = json.loads(output_of(capsys, *words[3:], "--json"))["rows"]
        assert [row["impl"] for row in rows] == ["eager", "portable"]
        assert {row["case"] for row in rows} == {"T16 C4096"}

    def test_a_failure_says_how_to_see_it_again(self, capsys):
        """Guards the command that reproduces a failed row."""
        case = numerics_cases()[0]
        row = ops.check_case(case, CPU, torch.float32, ["eager"])[0] | {"failure": "wrong"}
        show.errors([row])
        command_line = repro.command(case.op, case.name, "eager", "float32", "numerics")
        assert f"to reproduce: {command_line}" in capsys.readouterr().out


class TestDecode:
    def test_rows_and_parts(self, quick, monkeypatch, capsys):
        """Guards the step's parts: every form has them, of known kinds, attention and products
        included."""
        monkeypatch.setattr(timing, "MIN_REPEATS", 1)
        sizes = ("--batch", "2", "--prefix", "70", "--suffix", "5")
        arguments = ("decode", "--model", "tiny", *sizes, "--impl", "eager", "default")
        all_rows = json.loads(output_of(capsys, *arguments, "--json"))["rows"]
        steps = [row for row in all_rows if row["op"] == "decode_step"]
        parts = [row for row in all_rows if row["op"] == "decode_part"]
        assert [row["impl"] for row in steps] == ["eager", "default"]
        assert {row["impl"] for row in parts} == {"eager", "default"}
        kinds = {row["part"] for row in parts}
        assert {"linear", "rms_norm", "silu_mul", "sample", "prefix_attention"} <= kinds
        assert kinds <= {*OPS, "linear", "embed", "other"}
        assert all(row["median_us"] > 0 for row in parts)
        show.decode(all_rows)
        assert "time by part" in capsys.readouterr().out

    def test_too_large(self, monkeypatch, capsys):
        """Guards against a model that does not fit ending in a crash, or in silence."""
        monkeypatch.setattr(decode, "free_bytes", lambda device: 8 << 30)
        out = output_of(capsys, "decode", "--model", "step3-vl-10b", "--batch", "4")
        assert "needs 41.2 GB, 8.6 GB are free (step3-vl-10b B4 P512 S64)" in out

    def test_needed(self):
        """Guards the reported memory: 20.3 GB of weights in bf16, KV and its FP8 copy, logits, and
        the eager form's 16 bytes for each head's element of K or V, and each score."""
        config = PRESETS["step3-vl-10b"]
        case = DecodeCase(16, 2048, 512)
        kv = 147_456 * (2048 + 16 * 512)
        needed = decode.needed_bytes(config, case, torch.bfloat16)
        eager = 16 * (2048 + 512) * 32 * (128 + 1)
        assert needed == 2 * 10_171_750_144 + 2 * kv + 8 * 16 * 151_936 + eager
        lone = (DecodeCase(1, 131072, 1), DecodeCase(1, 262144, 1))
        one, two = (decode.needed_bytes(config, case, torch.bfloat16) for case in lone)
        assert two - one == 131072 * (2 * 147_456 + 16 * 32 * 129)
        prompt = decode.needed_bytes(config, PrefillCase(262144), torch.bfloat16)
        assert prompt < two + 8 * (2 << 30)  # not all scores of a chunk: they would take 69 GB


class TestBreakdown:
    def test_time_of_nested_spans(self):
        """Guards against a span's time being lost, or counted again in the span around it."""
        x = torch.randn(300, 300)

        def call():
            with span("decoder layer", 0):
                with span("outer"):
                    x @ x
                    with span("linear down"):
                        for _ in range(40):
                            x @ x
                x + x

        times = breakdown.parts(call, CPU)
        assert times.keys() == {"outer", "linear", "other"}
        assert times["linear"] > 4 * times["outer"] > 0
        assert times["linear"] > times["other"] > 0

    def test_spans_are_off_again(self):
        """Guards later measurements against the profiler's spans."""
        breakdown.parts(lambda: None, CPU)
        assert span("a") is span("b")


class TestSchema:
    def test_rows_have_their_schema(self):
        """Guards rows against being read with another meaning of their fields."""
        fields = rows.origin(CPU)
        assert fields["schema"] == SCHEMA
        assert fields["time"].endswith("Z")

    def test_another_schema_is_refused(self, tmp_path):
        """Guards reports and comparisons against rows whose fields have another meaning."""
        file = tmp_path / "rows.jsonl"
        file.write_text('{"op": "a"}\n{"op": "a", "schema": 99, "commit": "abc"}\n')
        with pytest.raises(InputError, match=r":2: the row has schema 99, not 1; commit abc can"):
            jsonl.read(file)


class TestPytestFrontEnd:
    @pytest.mark.cli
    def test_tables_and_json(self, tmp_path):
        """Guards `pytest bench/`: the command's cases, sampled by the project's timer."""
        out = tmp_path / "b.json"
        selected = "rms_norm and T1 and portable"
        arguments = ["-k", selected, f"--benchmark-json={out}", "-p", "no:xdist"]
        command_line = [sys.executable, "-m", "pytest", "bench/", *arguments]
        root = Path(command.__file__).parents[1]
        # When tests run in parallel, pytest-benchmark sees it in the environment and does nothing.
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
        }
        done = subprocess.run(
            command_line, cwd=root, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        benchmarks = json.loads(out.read_text())["benchmarks"]
        names = [f"test_op[rms_norm: T{rows} C4096: portable: float32]" for rows in (1, 16)]
        assert [row["name"] for row in benchmarks] == names
        assert all(0 < row["stats"]["median"] < 60 for row in benchmarks)
        assert benchmarks[0]["extra_info"]["timer"] == "clock"

    def test_wrong_numbers_fail(self, monkeypatch):
        """Guards against a table of a form that is fast because it is wrong."""
        from bench import test_ops

        op = OPS["quick_gelu"]

        def wrong(x, *, impl):
            return op.run(x, impl=impl) * 1.01

        monkeypatch.setitem(OPS, "quick_gelu", replace(op, run=wrong))
        case = next(case for case in cases("cpu") if case.op == "quick_gelu")
        monkeypatch.setattr(test_ops, "_expected", lambda case: expected)
        inputs = case.inputs(0, CPU, torch.float32)
        expected = inputs, [op.run(**inputs, impl="eager")]
        with pytest.raises(AssertionError, match="exceeds"):
            test_ops.test_op(SimpleNamespace(), case, "portable")


def test_every_command_explains_itself(capsys):
    """Guards `--help` of each command."""
    for name in command.COMMANDS:
        with pytest.raises(SystemExit):
            command.main([name, "--help"])
        assert len(capsys.readouterr().out) > 200
