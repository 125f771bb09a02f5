"""A user's own kernel in the op table: `--with FILE:FUNCTION`."""

import json
import re
import shlex
import sys

import pytest

from bench import __main__ as command
from bench.measure import timing
from bench.suite import PEERS
from model.errors import InputError

KERNEL = """
import neighbour
from kernels.norm import rms_norm

def right(x, weight, residual, eps):
    return rms_norm(x, weight, residual=residual, eps=eps, impl="eager")

def wrong(**arguments):
    y, total = right(**arguments)
    return y * neighbour.FACTOR, total

def ahead(inputs):
    calls = []
    def call():
        calls.append(None)
        return right(**inputs)
    return call

def other_arguments(q):
    return q

eager = right
"""


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """The file above, and a table that is what it was after the test."""
    monkeypatch.setattr(timing, "MAX_REPEATS", timing.MIN_REPEATS)
    monkeypatch.setitem(PEERS, "rms_norm", dict(PEERS["rms_norm"]))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("mykernel", "neighbour"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "neighbour.py").write_text("FACTOR = 1.01\n")
    file = tmp_path / "mykernel.py"
    file.write_text(KERNEL)
    return file


def run(command_name, file, *functions, more=()):
    names = [f"{file}:{name}" for name in functions]
    words = ["--op", "rms_norm", "--shape", "T1 C4096", "--device", "cpu", "--json"]
    budget = ["--budget", "0.001"] if command_name == "ops" else []
    return command.main([command_name, *words, *budget, *more, "--with", *names])


def test_right_functions_are_timed_and_a_wrong_one_is_not(kernel, capsys):
    """Guards the promise to a user: checked first, timed in turns with all forms; a wrong function
    gets no time, and the exit code says so."""
    assert run("ops", kernel, "right", "ahead", "wrong") == 1
    rows = {row["impl"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == ["eager", "portable", "right", "ahead", "wrong"]
    for name in ("right", "ahead"):
        assert rows[name]["failure"] is None
        assert rows[name]["speedup"] > 0
        assert rows[name]["version"] == f"{kernel}:{name}"
    assert rows["wrong"]["median_us"] is None
    assert "exceeds" in rows["wrong"]["failure"]


def test_only_named_forms_and_the_users(kernel, capsys):
    """Guards `--impl`: the user's function need not be named again."""
    assert run("ops", kernel, "right", more=("--impl", "eager")) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["impl"] for row in rows] == ["eager", "right"]


def test_numerics_checks_it_on_irregular_shapes(kernel, capsys):
    """Guards a kernel that is right at one shape only."""
    words = ["numerics", "--op", "rms_norm", "--device", "cpu", "--dtype", "float32", "--json"]
    assert command.main([*words, "--impl", "right", "--with", f"{kernel}:right"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["case"] for row in rows} == {"T7 C4096", "T1 C97 alone"}


def test_wrong_arguments_are_named(kernel, capsys):
    """Guards a function that takes something else: its row says which argument."""
    assert run("ops", kernel, "other_arguments") == 1
    row = json.loads(capsys.readouterr().out)["rows"][-1]
    assert "unexpected keyword argument 'x'" in row["failure"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{file}", "say FILE:FUNCTION"),
        ("{file}:2", "say FILE:FUNCTION"),
        ("missing.py:f", "there is no file missing.py"),
        ("{folder}/notes.txt:f", "is no Python file"),
        ("{folder}/broken.py:f", "importing .*broken.py failed: ZeroDivisionError: division"),
        ("{folder}/exits.py:f", "importing .*exits.py failed: SystemExit: 3"),
        ("{file}:fast", "has no function fast; it has rms_norm, right, wrong, ahead"),
        ("{file}:eager", "form 'eager' is built in"),
        ("{folder}/notes.py:f", "has no function f; it has none"),
    ],
)
def test_mistakes_are_one_line(kernel, text, message):
    """Guards a user's mistakes against a traceback."""
    folder = kernel.parent
    (folder / "notes.txt").write_text("")
    (folder / "notes.py").write_text("")
    (folder / "broken.py").write_text("1 / 0\n")
    (folder / "exits.py").write_text("raise SystemExit(3)\n")
    words = ["ops", "--op", "rms_norm", "--device", "cpu", "--with"]
    with pytest.raises(InputError, match=message):
        command.main([*words, text.format(file=kernel, folder=folder)])


@pytest.mark.parametrize("ops", [(), ("--op", "rms_norm", "silu_mul")])
def test_one_op_must_be_named(kernel, ops):
    """Guards against a function that gets the arguments of another op."""
    with pytest.raises(InputError, match="--with needs --op and one op"):
        command.main(["ops", *ops, "--device", "cpu", "--with", f"{kernel}:right"])


def test_the_command_of_a_failed_row_works(kernel, capsys):
    """Guards the printed command: it names the function's file, without which it fails."""
    words = ["ops", "--op", "rms_norm", "--shape", "T1 C4096", "--device", "cpu"]
    assert command.main([*words, "--with", f"{kernel}:wrong", "--budget", "0.001"]) == 1
    (line,) = re.findall(r"to reproduce: python -m bench (.*)", capsys.readouterr().out)
    assert command.main([*shlex.split(line), "--device", "cpu", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["impl"] for row in rows] == ["eager", "wrong"]


def test_a_file_may_have_a_packages_name(kernel, capsys):
    """Guards our own packages and others' against a user's kernels.py, which would hide them."""
    import kernels

    file = kernel.rename(kernel.with_name("kernels.py"))
    assert run("ops", file, "right", more=("--impl", "eager")) == 0
    assert json.loads(capsys.readouterr().out)["rows"][1]["version"] == f"{file}:right"
    assert sys.modules["kernels"] is kernels
    assert sys.path[-1] == str(file.parent)


def test_each_command_has_only_its_own_function(kernel, capsys):
    """Guards `--repro`: a row's command runs the row's form, not all that were given."""
    words = ["ops", "--op", "rms_norm", "--shape", "T1 C4096", "--device", "cpu", "--repro"]
    assert command.main([*words, "--with", f"{kernel}:right", f"{kernel}:wrong"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("--with") for line in lines] == [0, 0, 1, 1]
    assert f"{kernel}:wrong" not in lines[2]
