"""`python -m bench peers` and docs/peers.md: which libraries there are, and how to get them."""

import json
import re

import pytest
import torch

from bench import model_peers
from bench.cli import peers
from bench.suite import PEERS
from model.errors import InputError
from model.terminal import Parser
from tests.support import ROOT

PAGE = ROOT / "docs" / "peers.md"
WHEELS = ROOT / "bench" / "peers" / "requirements.txt"
CODE = [ROOT / "setup.py", *sorted((ROOT / "bench" / "peers").rglob("*.py"))]


def listed(capsys, *arguments) -> list[dict]:
    """The rows that `python -m bench peers ARGUMENTS --json` prints."""
    options = parsed(*arguments, "--device", "cpu", "--json")
    assert peers.run(options) == 0
    return json.loads(capsys.readouterr().out)["peers"]


def parsed(*arguments):
    parser = Parser()
    peers.add_arguments(parser)
    return parser.parse_args(arguments)


def test_every_peer_has_a_row(capsys):
    """Guards the list: an unusable peer has a reason and a way to get it, in one line."""
    rows = {(row["op"], row["peer"]): row for row in listed(capsys)}
    of_ops = {(op, name) for op, named in PEERS.items() for name in named}
    assert rows.keys() == of_ops | {("whole model", name) for name in model_peers.PEERS}
    sdpa, fa3 = (rows["prefix_attention", name] for name in ("sdpa", "fa3"))
    assert sdpa["absent"] is None
    assert sdpa["version"] == f"torch {torch.__version__}"
    assert fa3["absent"] == "needs a GPU"
    assert all(len(row["get"].splitlines()) == 1 for row in rows.values())


def test_of_some_ops(capsys):
    """Guards `--op`: only the peers of the ops that it names, and one line for an unknown op."""
    rows = listed(capsys, "--op", "projector", "rms_norm")
    assert {row["op"] for row in rows} == {"projector", "rms_norm"}
    with pytest.raises(InputError, match="'norm' .choose from 'prefix_attention'"):
        parsed("--op", "norm")


def test_table(capsys):
    """Guards the table against a library that is not installed and has no version."""
    assert peers.run(parsed("--device", "cpu")) == 0
    lines = capsys.readouterr().out.splitlines()
    (liger,) = [line for line in lines if line.startswith("silu_mul") and " Liger " in line]
    assert "needs a GPU" in liger and liger.endswith("pip install liger-kernel==0.8.5")


def test_the_page_lists_every_peer():
    """Guards the table of docs/peers.md against a peer that was added, renamed or removed. An op
    that only torch.compile has needs no row."""
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    listed = {op: set(re.findall(r"`(\w[\w-]*)`", text)) for op, text in rows}
    assert listed == {
        op: {name for name in named if not name.endswith("-alone")}
        for op, named in PEERS.items()
        if named.keys() - {"compile"}
    }


def test_one_version_of_each_library():
    """Guards docs/peers.md: the versions that it installs are those that the code names."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in (PAGE, WHEELS, *CODE)}
    versions = dict(re.findall(r"([\w-]+)==(\d[\w.]*\w)", texts["peers.md"]))
    assert versions.keys() >= {"flashinfer-python", "liger-kernel", "xformers", "vllm"}
    assert versions["flashinfer-jit-cache"] == versions["flashinfer-python"]
    others = [
        (name, library, found)
        for name, text in texts.items()
        for library, version in versions.items()
        for found in re.findall(rf"{library}(?:==| )(\d[\w.]*\w)", text)
        if found != version
    ]
    assert others == []


def test_torch_is_not_among_the_wheels():
    """Guards the GPU machine's torch, Triton and NumPy: they are not listed, nor dependencies."""
    names = re.findall(r"^[\w-]+", WHEELS.read_text(encoding="utf-8"), re.MULTILINE)
    assert "flashinfer-python" in names
    assert not {"torch", "triton", "numpy"} & set(names)
    commands = re.findall(r"^    pip (?:.*\\\n)*.*", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) > 2
    assert all("--no-deps" in command or "llama" in command for command in commands)
