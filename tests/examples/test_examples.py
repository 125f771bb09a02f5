"""The scripts in examples/: each stays short, and runs as a user would run it."""

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.support import ROOT

EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
MAX_LINES = 40

# A line that the example prints, as a regular expression; packages that a GPU node may lack.
TEXT = ("tokenizers", "jinja2")
PRINTS = {
    "look_at_a_photo": (r"^1280 x 720 pixels: \d+ crops and a global view$", ("PIL", *TEXT)),
    "my_attention": (r"^prefix_attention +B16 P2048 S128 +attend +\w+ +[\d,.]+ ", ()),
    "pack_two_problems": (r"^  \d+ steps for \d+ tokens: [\d.]+ tokens per step$", TEXT),
    "patch_a_model": (r"^stock [\d.]+ ms, ours [\d.]+ ms, speed-up [\d.]+x$", ("transformers",)),
    "shared_prefix_decode": (r"^eager [\d.]+ ms, ours [\d.]+ ms, speed-up [\d.]+x$", ()),
}

examples = pytest.mark.parametrize("name", EXAMPLES)


@pytest.mark.cli
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=(pytest.mark.gpu, pytest.mark.slow_gpu))],  # it is timed
)
@examples
def test_example_runs(name, device, tmp_path):
    """Guards every example against a change of what it calls: it ends well and prints its result,
    from any working directory."""
    pattern, packages = PRINTS[name]
    missing = [package for package in packages if not find_spec(package)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    set_by_tests = ("TRITON_INTERPRET", "PACORE_WARM_UP")
    env = {key: value for key, value in os.environ.items() if key not in set_by_tests}
    env["PYTHONPATH"] = str(ROOT)
    if device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, str(EXAMPLES[name])]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.search(pattern, result.stdout, re.MULTILINE), result.stdout
    assert not list(tmp_path.iterdir()), "an example leaves files behind"


@examples
def test_example_is_short_and_says_how_to_run_it(name):
    """Guards against examples that grow into programs, and that a stranger cannot start."""
    source = EXAMPLES[name].read_text()
    assert source.count("\n") <= MAX_LINES
    docstring = ast.get_docstring(ast.parse(source)) or ""
    assert f".venv/bin/python examples/{name}.py" in docstring


def test_every_example_is_found():
    """Guards the tests above against a folder that has moved, and an example without a result."""
    assert EXAMPLES.keys() == PRINTS.keys()
