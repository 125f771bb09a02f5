"""The package named `kernels` fools no library, and the rooms import on a bare GPU node.

Each check runs in its own process with the checkout on the path, as a user would run it.
"""

import ast
import subprocess
import sys
from pathlib import Path

import kernels

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "model", "pacore_sched", "bench", "profiles")

# What a GPU node may lack, and the modules that are only for machines that have it.
ABSENT = {"PIL", "rich", "jinja2", "tokenizers", "safetensors", "gguf", "transformers"}
ABSENT |= {"skimage", "matplotlib", "timm", "hypothesis", "pytest", "nvtx"}
NEEDS_MORE = {"model.image", "model.tokenizer", "model.prompt", "model.checkpoint", "model.gguf"}
NEEDS_MORE |= {"bench.test_ops"}

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

assert not is_kernels_available(), "transformers takes this checkout for the library of that name"
config = Qwen3Config(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, head_dim=8,
)
print(tuple(Qwen3ForCausalLM(config)(torch.arange(5)[None]).logits.shape))
"""


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
    """Guards against transformers taking `kernels` for the library, which it does from 0.9 on."""
    major, minor, _ = (int(part) for part in kernels.__version__.split("."))
    assert (major, minor) < (0, 9)


def test_kernels_package_imports_nothing():
    """Guards transformers' start-up, which imports the package `kernels` to ask its version."""
    tree = ast.parse((ROOT / "kernels" / "__init__.py").read_text())
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]


def test_transformers_works_beside_the_checkout():
    """Guards transformers' models, which would call that library if it seemed installed."""
    result = run(QWEN3)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "(1, 5, 32)"


def test_rooms_import_on_a_bare_node():
    """Guards recording on GPU nodes, which may offer torch, Triton and NumPy alone."""
    assert modules() > NEEDS_MORE, "an exception that no longer exists"
    result = import_without(ABSENT, sorted(modules() - NEEDS_MORE))
    assert result.returncode == 0, result.stderr


def test_blocker_blocks():
    """Guards the test above: what is blocked is not found, and what is not blocked is."""
    result = import_without({"PIL"}, ["json", "PIL.Image"])
    assert "No module named 'PIL' (blocked)" in result.stderr
    assert import_without({"PIL"}, ["json"]).returncode == 0
