"""Tests of packaging: the name `kernels`, imports on a bare GPU node, and the contents of a wheel.

Each check runs in a separate process as a user would run it: with the checkout on the path, or with
an installed wheel, no checkout, and an empty working folder.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kernels
from tests.support import ROOT, wheels

pytestmark = pytest.mark.cli

ROOMS = ("kernels", "model", "pacore_sched", "bench", "profiles")

# Libraries that a GPU node may lack, and the modules that need them on import.
ABSENT = {"PIL", "rich", "jinja2", "tokenizers", "safetensors", "gguf", "transformers"}
ABSENT |= {"skimage", "matplotlib", "timm", "hypothesis", "pytest", "nvtx"}
NEEDS_MORE = {
    "model.vision.image",
    "model.text.tokenizer",
    "model.text.prompt",
    "model.weights.checkpoint",
    "model.weights.gguf",
    "model.hf.paged_cache",
}
NEEDS_MORE |= {"bench.test_ops"}

DATA = {  # files whose absence no command below would report, or only with optional libraries
    "bench/report/page.html.jinja",
    "pacore_sched/serve/page/index.html",
    "pacore_sched/serve/page/page.css",
    "pacore_sched/serve/page/page.js",
    "profiles/results/amd-epyc-avx2-2-threads/bench.jsonl",
    "profiles/static/baseline.jsonl",
}

BLOCK_AND_IMPORT = """
import importlib, sys

class Blocked:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

sys.meta_path.insert(0, Blocked)
for module in sys.argv[2].split(","):
    importlib.import_module(module)
"""

QWEN3 = """
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils.import_utils import is_kernels_available

assert not is_kernels_available(), "transformers takes this checkout for the library `kernels`"
config = Qwen3Config(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, head_dim=8,
)
print(tuple(Qwen3ForCausalLM(config)(torch.arange(5)[None]).logits.shape))
"""

# Every command's --help and some short runs, in one process: torch is imported once.
COMMANDS = """
import contextlib, io, sys
import bench.__main__, model.__main__, pacore_sched.__main__, profiles.__main__
from bench.studies import e2e, fp8_kv
from model.step3vl import Step3VL
from profiles.console import main

rooms = sys.argv[1].split(",")

def call(*argv):
    sys.argv = ["step3vl-pacore", *argv]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main()
        except SystemExit as ended:
            assert ended.code == 0, argv
    return out.getvalue()

known = {
    (): pacore_sched.__main__.COMMANDS,
    ("bench",): bench.__main__.COMMANDS,
    ("profiles",): profiles.__main__.COMMANDS,
    ("model",): model.__main__.COMMANDS,
}
for room, names in known.items():
    for name in names:
        line = (*room, name)
        assert call(*line, "--help").startswith(f"usage: step3vl-pacore {' '.join(line)} "), line
call("ask", "Hello?", "--model", "tiny", "--widths", "1", "--max-tokens", "2", "--device", "cpu")
call("bench", "numerics", "--op", "rms_norm", "--dtype", "float32", "--device", "cpu")
call("profiles", "static", "--op", "rms_norm", "--quick", "--arch", "90")
tiny = Step3VL.from_preset("tiny", seed=0, device="cpu")
Step3VL.from_preset = lambda *arguments, **options: tiny  # other presets' weights may be missing
fp8_kv.TOKENS = 16
call("bench", "fp8", "--device", "cpu")
assert "Apache License" in e2e._question(tiny)  # the rest of `e2e` takes a minute
print(*(module.__file__ for name, module in sys.modules.items() if name.split(".")[0] in rooms))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools", minversion="77")
    names = (*ROOMS, "examples", "setup.py", "pyproject.toml", "LICENSE")
    return wheels.build(ROOT, names, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment with our wheel and the packages installed here, without the checkout."""
    env = wheels.environment(tmp_path_factory.mktemp("installed"))
    env.install(wheel)
    folders = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (env.packages / "others.pth").write_text("\n".join(folders))  # their .pth files are not read
    return env


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A wheel with the name and layout of Hugging Face's `kernels`."""
    files = {
        "kernels/__init__.py": "from kernels.load import get_kernel\n",
        "kernels/load.py": "def get_kernel(): pass\n",
    }
    return wheels.write(tmp_path_factory.mktemp("theirs"), "kernels", "0.17.2", files)


def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def import_without(absent: set[str], modules: list[str]) -> subprocess.CompletedProcess:
    return run(BLOCK_AND_IMPORT, ",".join(absent), ",".join(modules))


def modules() -> set[str]:
    """Every module of every room."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
    }


def test_version_stays_below_that_of_the_library():
    """Guards against transformers taking our `kernels` for the library, which it does from 0.9."""
    major, minor, _ = (int(part) for part in kernels.__version__.split("."))
    assert (major, minor) < (0, 9)


def test_kernels_package_imports_nothing():
    """Guards transformers' start-up, which imports the package `kernels` to read its version."""
    tree = ast.parse((ROOT / "kernels" / "__init__.py").read_text())
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]


@pytest.mark.judge
def test_transformers_works_with_the_checkout():
    """Guards transformers' models, which would call the library `kernels` if it seemed present."""
    result = run(QWEN3)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "(1, 5, 32)"


def test_rooms_import_on_a_bare_node():
    """Guards recording on GPU nodes, which may have only torch, Triton and NumPy."""
    assert modules() > NEEDS_MORE, "NEEDS_MORE lists a module that no longer exists"
    result = import_without(ABSENT, sorted(modules() - NEEDS_MORE))
    assert result.returncode == 0, result.stderr


def test_scheduler_and_simulator_need_no_torch():
    """Guards imports without torch, which the rules of test_layers.py promise."""
    packages = ("pacore_sched.sched", "pacore_sched.sim")
    names = sorted(name for name in modules() if name.startswith(packages))
    assert len(names) > 15
    result = import_without({"torch", "triton"}, names)
    assert result.returncode == 0, result.stderr


def test_blocker_blocks():
    """Guards the tests above: blocked modules are not found, and others are."""
    result = import_without({"PIL"}, ["json", "PIL.Image"])
    assert "No module named 'PIL' (blocked)" in result.stderr
    assert import_without({"PIL"}, ["json"]).returncode == 0


def test_a_wheel_has_all_that_commands_need(installed):
    """Guards against files and modules that only a checkout has, and a usage line with a name other
    than the one typed."""
    done = installed.run("python", "-c", COMMANDS, ",".join(ROOMS))
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.splitlines()[-1].split()
    assert len(loaded) > 100
    assert all(Path(path).is_relative_to(installed.packages) for path in loaded), loaded
    assert not list(installed.empty.iterdir())
    assert all((installed.packages / name).is_file() for name in DATA)
    assert not (installed.packages / "examples").exists()


def test_the_console_command(installed):
    """Guards the script that pip creates: its commands, its start without torch, its errors."""
    done = installed.run("step3vl-pacore", "--help")
    assert done.returncode == 0, done.stderr
    for name in ("ask", "batch", "sample", "simulate", "bench", "profiles", "model"):
        assert f"\n    {name} " in done.stdout
    script = (
        "import sys; from profiles.console import main\ntry: main()\nfinally: print(*sys.modules)"
    )
    done = installed.run("python", "-c", script, "simulate", "--help")
    assert done.stdout.startswith("usage: step3vl-pacore simulate ")
    assert "torch" not in done.stdout.split()
    small = ("--workload", "vqa", "--policy", "fcfs", "--problems", "2", "--seeds", "1")
    assert installed.run("step3vl-pacore", "simulate", *small).returncode == 0
    for arguments, message in (
        ([], "are required: COMMAND (see `step3vl-pacore --help`)"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["profiles", "nothing"], "(see `step3vl-pacore profiles --help`)"),
        (["profiles", "tables"], "only in a checkout of the repository"),
        (["bench", "compare", "HEAD", "."], "is not a git checkout"),
    ):
        done = installed.run("step3vl-pacore", *arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_another_distribution_named_kernels(wheel, theirs, tmp_path):
    """Guards against a traceback, or silence, if pip has mixed two folders `kernels/`."""
    env = wheels.environment(tmp_path)

    def run_command(*command):
        done = env.run(*(command or ("step3vl-pacore", "--version")))
        assert done.stderr.count("\n") <= 1, done.stderr
        return done.returncode, done.stderr

    env.install(theirs)
    env.install(wheel)
    code, text = run_command()
    assert code == 0
    assert text.startswith("warning: Hugging Face's `kernels` 0.17.2 is installed too")
    assert "separate virtual environment" in text
    assert run_command("python", "-m", "profiles", "--help") == (0, text)
    env.pip("uninstall", "--yes", "kernels")
    code, text = run_command()
    assert code == 2
    assert "kernels/__init__.py is missing" in text
    assert "--force-reinstall" in text
    env.install(wheel)
    assert run_command() == (0, "")
    env.install(theirs)
    code, text = run_command()
    assert code == 2
    assert text.startswith("error: `import kernels` finds ")
    assert "separate virtual environment" in text
    for room in ROOMS[1:]:
        assert run_command("python", "-m", room, "--help") == (2, text)


def test_another_distribution_before_an_editable_install(theirs, tmp_path):
    """Guards an editable install, whose checkout comes after site-packages on the path: commands
    must report that they get the other package, unless they run in the checkout."""
    env = wheels.environment(tmp_path)
    (env.packages / "editable.pth").write_text(str(ROOT))
    env.install(theirs)
    command = ("python", "-m", "profiles", "--help")
    done = env.run(*command)
    assert done.returncode == 2
    assert f"finds {env.packages}/kernels/__init__.py, which belongs to another" in done.stderr
    done = env.run(*command, cwd=ROOT)
    assert done.returncode == 0
    assert done.stderr.startswith("warning: ")
