"""Kernel packs, and Triton's launchers without a GPU.

Launches arrive at a libcuda that runs nothing (stub_libcuda.c), built by gcc.
"""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import triton
from triton.backends import nvidia
from triton.runtime import cache

from bench.inputs.presets import TINY
from bench.launch_sites import check_sites, launch_case
from bench.suite import cases, numerics_cases
from kernels.runtime.configs import H200
from model.errors import InputError
from model.terminal import Parser
from pacore_sched.engine.compile_ahead import Summary
from pacore_sched.engine.launch_sites import launch_graph
from profiles.packs import command as kernels_command
from profiles.packs import kernel_pack
from profiles.packs.kernel_pack import pack, unpack
from tests.support import ROOT

pytestmark = pytest.mark.cli

OTHER_WHEEL = "3.6.0-of-another-wheel"
DTYPE = torch.bfloat16
SPLIT = "smollm2 ragged decode", "triton split=1"


def few_sites() -> list[Callable]:
    """Every kernel at least once: each form of each op, a captured decode step, and configs that
    the rule does not choose."""
    first = {}
    for case in numerics_cases():
        for form in ("triton", *case.modes):
            first.setdefault((case.op, form), case)
    forms = [partial(launch_case, case, form, DTYPE) for (_, form), case in first.items()]
    view = next(case for case in cases("cuda") if case.op == "projector")  # tiles are split
    decode = partial(launch_graph, TINY, DTYPE, DTYPE, 4)
    switched = [
        site
        for site in check_sites()
        if (site.args[0].name, site.args[1]) in (SPLIT, ("T7 C4096", "triton pdl=1"))
    ]
    assert len(switched) == 2
    return [*forms, partial(launch_case, view, "triton", DTYPE), decode, *switched]


@pytest.fixture(scope="module")
def stub(tmp_path_factory) -> Path:
    """The folder of a libcuda.so.1 that runs nothing."""
    if not shutil.which("gcc"):
        pytest.skip("Triton's launchers, and the libcuda they are tested with, need gcc")
    folder = tmp_path_factory.mktemp("stub")
    include = Path(nvidia.__file__).parent / "include"
    command = [
        "gcc",
        "-shared",
        "-fPIC",
        f"-I{include}",
        str(ROOT / "tests/support/stub_libcuda.c"),
    ]
    subprocess.run([*command, "-o", str(folder / "libcuda.so.1")], check=True)
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[Path, Summary]:
    """A pack of `few_sites` for sm_90."""
    path = tmp_path_factory.mktemp("pack") / "kernels.pack"
    return path, pack(path, few_sites(), [H200])


def launched(stub: Path, sites: list[Callable], **environment: str) -> dict:
    """The report of tests/support/stub_launches.py for the sites."""
    file = stub / "sites.pickle"
    file.write_bytes(pickle.dumps(sites))
    libcuda = {"LD_LIBRARY_PATH": str(stub), "TRITON_LIBCUDA_PATH": str(stub)}
    env = os.environ | libcuda | environment
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.support.stub_launches", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_another_wheel_finds_all_and_launches_as_compiled(stub, packed, tmp_path, monkeypatch):
    """Guards the keys (a GPU node that compiles again loses minutes), and launchers, grids, blocks,
    shared memory and parameters, which otherwise only a GPU would check."""
    path, done = packed
    assert (done.failures, done.compiled) == ((), len(done.keys))
    folder = tmp_path / "cache"
    monkeypatch.setattr(cache, "triton_key", lambda: OTHER_WHEEL)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    assert unpack(path) == (len(done.keys), len(done.keys))
    with (
        pytest.warns(UserWarning, match="packed from other sources"),
        monkeypatch.context() as edit,
    ):
        edit.setattr(kernel_pack, "source_hash", lambda *packages: "of today")
        assert unpack(path) == (len(done.keys), 0)
    environment = {"TRITON_CACHE_DIR": str(folder), "TRITON_KEY_OF_ANOTHER_WHEEL": OTHER_WHEEL}
    found = launched(stub, few_sites(), **environment)
    assert found["wrong"] == []
    assert (found["misses"], found["hits"]) == (0, len(done.keys))
    sources = "".join(file.read_text() for file in (ROOT / "kernels").rglob("*.py"))
    assert set(found["launches"]) == set(re.findall(r"^def (\w+_kernel)\(", sources, re.M))


def test_a_pack_that_would_not_be_found_is_refused(packed, tmp_path, monkeypatch):
    """Guards a node's first minutes: kernels of another Triton or ptxas would never be used."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    here = re.escape(triton.__version__)
    with monkeypatch.context() as patch:
        patch.setattr(triton, "__version__", "9.0.0")
        with pytest.raises(InputError, match=rf"with Triton {here}, but this is 9\.0\.0: pack"):
            unpack(packed[0])
    monkeypatch.setattr(kernel_pack, "get_cache_invalidating_env_vars", lambda: {"A": "1"})
    with pytest.raises(InputError, match="another ptxas, or with other environment variables"):
        unpack(packed[0])
    assert not (tmp_path / "cache").exists()


def test_other_files_are_refused(packed, tmp_path, monkeypatch):
    """Guards the message: a wrong path or a truncated download gave a traceback, a pipe no end."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    half = tmp_path / "half.pack"
    half.write_bytes(packed[0].read_bytes()[:-1000])
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path / "none.pack", "none.pack cannot be read: No such file"),
        (tmp_path / "pipe", "is a pipe, socket or device; it must be a file"),
        (Path(__file__), "is not a file of `profiles kernels pack`"),
        (half, "is not a file of `profiles kernels pack`"),
    ):
        with pytest.raises(InputError, match=words) as raised:
            unpack(path)
        assert "\\n" not in str(raised.value), "several lines of tarfile's"


def run(*arguments: str) -> int:
    """Run the command; its exit code."""
    parser = Parser()
    kernels_command.add_arguments(parser)
    return kernels_command.run(parser.parse_args(arguments))


def test_the_command_reports_its_result(packed, tmp_path, monkeypatch, capsys):
    """Guards scripts that read its JSON, and the exit code of a pack that lacks a kernel."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    count = len(packed[1].keys)
    assert run("unpack", str(packed[0]), "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["kernels"], done["new"], done["bytes"]) == (count, count, packed[0].stat().st_size)
    assert run("unpack", str(packed[0])) == 0
    assert f"{count} kernels, 0 of them new here" in capsys.readouterr().out
    monkeypatch.setattr(kernels_command, "all_sites", lambda: [partial(int, "x")])
    assert run("pack", "--out", str(tmp_path / "broken.pack"), "--arch", "90") == 1
    out = capsys.readouterr().out
    assert out.startswith("FAILED: ValueError: invalid literal") and "0 kernels" in out


def test_refuses_to_start_if_it_could_not_compile_or_write(packed, tmp_path, monkeypatch):
    """Guards the message: it must not come after minutes of work, or as a traceback."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(InputError, match="TRITON_INTERPRET is set"):
        run("unpack", str(packed[0]))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(InputError, match="the folder .* does not exist"):
        run("pack", "--out", str(tmp_path / "nowhere" / "kernels.pack"))
