"""The bundle of peers for a machine without the internet: packed, resumed, installed.

pip, the compilers and FlashInfer's build are stood in for; archives, hashes and manifests are real.
"""

import hashlib
import json
import os
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from bench.bundles import bundle, command, install, prepare
from bench.bundles.bundle import BUILT, Bundle, Item, pack
from bench.bundles.prepare import Failed
from bench.peers import PEERS
from model.errors import InputError
from model.terminal import Parser

OBJECT = "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"
ITEMS = {
    "small": Item(("small==1.0", "its-need==2.0")),
    "fa3": Item(("vllm==0.1",), "vllm/vllm_flash_attn/_vllm_fa3_C*.so"),
    "flashinfer": Item(("flashinfer-python==0.6",)),
}
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


class Tools:
    """Stands in for `run_tool`: what was called, and which words make a call fail."""

    def __init__(self):
        self.calls, self.broken = [], set()

    def __call__(self, call, env=None):
        self.calls.append(call)
        for word in self.broken:
            if any(word in part for part in call):
                raise Failed(f"no {word} today")
        if "download" in call:
            self.download(Path(call[call.index("--dest") + 1]), call[-1])
        elif "bench.bundles.flashinfer_modules" in call:
            path = Path(env["FLASHINFER_WORKSPACE_BASE"]) / f"of_{call[-1]}.so"
            path.write_text(call[-1])
            return f"it says more\n{path}\n"
        return ""

    def download(self, folder, requirement):
        with zipfile.ZipFile(folder / f"{requirement.replace('==', '-')}-any.whl", "w") as wheel:
            wheel.writestr("metadata", requirement)
            if requirement.startswith("vllm"):
                wheel.writestr(OBJECT, "FA3's kernels")
                wheel.writestr("vllm/large.so", "and all else")

    def of(self, word):
        return [call for call in self.calls if word in call]


@pytest.fixture
def tools(monkeypatch):
    made = Tools()
    for module in (prepare, install):
        monkeypatch.setattr(module, "run_tool", made)
    monkeypatch.setattr(prepare, "ITEMS", ITEMS)
    monkeypatch.setattr(command, "ITEMS", ITEMS)
    monkeypatch.setattr(prepare, "_cuda_home", lambda: Path("cuda"))
    return made


def peers(capsys, *arguments):
    """Exit code and document of `python -m bench peers ARGUMENTS --json`."""
    parser = Parser()
    command.add_arguments(parser)
    code = command.run(parser.parse_args([*map(str, arguments), "--json"]))
    return code, json.loads(capsys.readouterr().out)


def made(capsys, folder, *arguments):
    """Exit code and rows by item of `prepare`."""
    code, document = peers(
        capsys, "prepare", "--dir", folder, "--python", HERE, "--platform", "any", *arguments
    )
    return code, {row["item"]: row for row in document["items"]}


def names_in(piece):
    with tarfile.open(piece) as archive:
        return sorted(archive.getnames())


class TestPieces:
    def test_each_fits_and_unpacks_by_itself(self, tmp_path):
        """Guards what is carried singly: no piece above the limit, and none needs another."""
        source = tmp_path / "source"
        for n in range(5):
            path = source / f"folder-{n % 2}" / f"{n}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(os.urandom(1000))
        entries = pack(source, tmp_path / "item", limit=2600)
        assert len(entries) > 2
        found = {}
        for entry in entries:
            piece = tmp_path / entry["file"]
            assert piece.stat().st_size == entry["bytes"] <= 2600
            assert hashlib.sha256(piece.read_bytes()).hexdigest() == entry["sha256"]
            with tarfile.open(piece) as archive:
                archive.extraction_filter = getattr(tarfile, "data_filter", None)
                archive.extractall(tmp_path / piece.stem)
            for held in entry["holds"]:
                found[held["file"]] = (tmp_path / piece.stem / held["file"]).read_bytes()
                assert hashlib.sha256(found[held["file"]]).hexdigest() == held["sha256"]
        assert found == {
            path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*.bin")
        }
        assert {path.name for path in tmp_path.glob("item*.xz*")} == {e["file"] for e in entries}

    def test_a_file_that_never_fits(self, tmp_path):
        """Guards against a piece that cannot be carried, or halving without an end."""
        (tmp_path / "large.bin").write_bytes(os.urandom(5000))
        with pytest.raises(InputError, match="large.bin does not fit"):
            pack(tmp_path, tmp_path / "item", limit=3000)

    def test_shared_objects_shrink(self, tmp_path):
        """Guards the size of objects, whose kernels resemble each other over megabytes."""
        (tmp_path / "a.so").write_bytes(2 * os.urandom(1 << 20))
        (entry,) = pack(tmp_path, tmp_path / "item")
        assert entry["bytes"] < 1.1 * 2**20


class TestPrepare:
    def test_all_of_it(self, tools, capsys, tmp_path):
        """Guards the bundle: every wheel at its pin, of FA3 the object alone, no rest."""
        code, rows = made(capsys, tmp_path)
        assert code == 0
        assert names_in(tmp_path / "small.tar.xz") == ["its-need-2.0-any.whl", "small-1.0-any.whl"]
        assert names_in(tmp_path / "fa3.tar.xz") == ["_vllm_fa3_C.abi3.so"]
        assert rows["fa3"]["bytes"] == (tmp_path / "fa3.tar.xz").stat().st_size
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "fa3.tar.xz", "flashinfer.tar.xz", "manifest.json", "small.tar.xz",
        ]  # fmt: skip
        for call in tools.of("download"):
            assert "--no-deps" in call and "--only-binary=:all:" in call
            assert call[call.index("--python-version") + 1] == HERE

    def test_platforms(self):
        """Guards wheels of older manylinux, which pip does not think of, and against newer."""
        options = prepare._for(prepare.Target(platform="manylinux_2_28_x86_64"))
        found = options[options.index("--platform") + 1 :: 2]
        assert found[0] == "manylinux_2_28_x86_64"
        assert {"manylinux_2_17_x86_64", "manylinux2014_x86_64"} <= set(found)
        assert "manylinux_2_31_x86_64" not in found

    def test_what_is_there_is_kept(self, tools, capsys, tmp_path, monkeypatch):
        """Guards resuming: right hashes are fetched no more, a wrong one and a new pin are."""
        made(capsys, tmp_path)
        tools.calls.clear()
        code, rows = made(capsys, tmp_path)
        assert code == 0 and tools.calls == []
        assert all(row["kept"] for row in rows.values())
        (tmp_path / "fa3.tar.xz").write_bytes(b"cut off")
        monkeypatch.setattr(prepare, "ITEMS", ITEMS | {"small": Item(("small==1.1",))})
        code, rows = made(capsys, tmp_path)
        assert [call[-1] for call in tools.calls] == ["small==1.1", "vllm==0.1"]
        assert names_in(tmp_path / "fa3.tar.xz") == ["_vllm_fa3_C.abi3.so"]
        assert names_in(tmp_path / "small.tar.xz") == ["small-1.1-any.whl"]

    def test_one_failure_costs_the_others_nothing(self, tools, capsys, tmp_path):
        """Guards what was fetched: it is in the manifest, and what comes again is the rest."""
        tools.broken = {"its-need"}
        code, rows = made(capsys, tmp_path)
        assert code == 1
        assert rows["small"]["failure"] == "no its-need today"
        assert rows["fa3"]["failure"] is rows["flashinfer"]["failure"] is None
        assert Bundle(tmp_path).items.keys() == {"fa3", "flashinfer"}
        tools.broken, tools.calls = set(), []
        code, rows = made(capsys, tmp_path)
        assert code == 0
        assert [call[-1] for call in tools.calls] == ["its-need==2.0"], "small==1.0 was there"

    def test_a_wheel_without_the_object(self, tools, capsys, tmp_path, monkeypatch):
        """Guards against an empty piece when a wheel's layout changes."""
        changed = ITEMS | {"fa3": Item(("vllm==0.1",), "vllm/elsewhere/*.so")}
        monkeypatch.setattr(prepare, "ITEMS", changed)
        code, rows = made(capsys, tmp_path)
        assert code == 1
        assert "holds no vllm/elsewhere/*.so" in rows["fa3"]["failure"]
        assert not (tmp_path / "fa3.tar.xz").exists()

    def test_built_modules(self, tools, capsys, tmp_path):
        """Guards minutes of nvcc: modules that are built stay when another fails or comes later."""
        tools.broken = {"page"}
        code, rows = made(capsys, tmp_path, "--only", BUILT, "--build", "cascade", "page")
        assert code == 1
        assert rows[BUILT]["failure"] == "page: no page today"
        assert names_in(tmp_path / f"{BUILT}.tar.xz") == ["of_cascade/of_cascade.so"]
        tools.broken, tools.calls = set(), []
        code, rows = made(capsys, tmp_path, "--only", BUILT, "--build", "page", "norm")
        assert code == 0
        assert [c[-1] for c in tools.of("bench.bundles.flashinfer_modules")] == ["page", "norm"]
        piece = tmp_path / f"{BUILT}.tar.xz"
        assert names_in(piece) == [f"of_{n}/of_{n}.so" for n in ("cascade", "norm", "page")]
        tools.calls.clear()
        made(capsys, tmp_path, "--only", BUILT, "--build", "cascade", "--arch", "8.0")
        assert names_in(piece) == ["of_cascade/of_cascade.so"], "of another architecture nothing"

    def test_mistakes(self, tools, capsys, tmp_path):
        """Guards one line that names what there is."""
        with pytest.raises(InputError, match="unknown item 'fa9'; choose of small, fa3, flash"):
            made(capsys, tmp_path, "--only", "fa9")
        with pytest.raises(InputError, match="unknown module 'x'; choose of cascade, page"):
            made(capsys, tmp_path, "--build", "x")
        made(capsys, tmp_path, "--only", "small")
        with pytest.raises(InputError, match=f"is for Python {HERE} on any: give another --dir"):
            peers(capsys, "prepare", "--dir", tmp_path, "--python", "3.99")
        (tmp_path / "manifest.json").write_text("[]")
        with pytest.raises(InputError, match="is no manifest"):
            made(capsys, tmp_path)

    def test_torch_is_not_among_them(self):
        """Guards the GPU machine's own torch and Triton, which --no-deps alone would not."""
        names = {
            wheel.partition("==")[0] for item in bundle.ITEMS.values() for wheel in item.wheels
        }
        assert not names & {"torch", "triton", "numpy"}
        assert all("==" in wheel for item in bundle.ITEMS.values() for wheel in item.wheels)

    @pytest.mark.cli
    def test_a_tool_that_fails(self):
        """Guards the reason beside an item: the line with the error, of pages of output."""
        script = "print('RuntimeError: see below\\nx.h: fatal error: no such file'); exit('end')"
        with pytest.raises(Failed, match="^x.h: fatal error: no such file$"):
            prepare.run_tool([sys.executable, "-c", script])
        with pytest.raises(Failed, match="no-such-tool"):
            prepare.run_tool(["no-such-tool"])
        assert prepare.run_tool([sys.executable, "-c", "print(1)"]) == "1\n"


class TestInstall:
    @pytest.fixture
    def folder(self, tools, capsys, tmp_path):
        made(capsys, tmp_path / "bundle", "--build", "cascade")
        tools.calls.clear()
        return tmp_path / "bundle"

    def test_all_of_it(self, tools, capsys, folder, tmp_path):
        """Guards the offline install: pip without index or needs, FA3 named, modules in place."""
        target = tmp_path / "site"
        code, document = peers(capsys, "install", "--dir", folder, "--target", target)
        assert code == 0
        assert [row["item"] for row in document["items"]][-1] == BUILT, "after what it goes into"
        assert len(tools.calls) == 2, "FA3 is no package"
        for call in tools.calls:
            assert "--no-index" in call and "--no-deps" in call
            assert list(Path(call[call.index("--find-links") + 1]).glob("*.whl"))
        assert tools.calls[0][-2:] == ["small==1.0", "its-need"], "a need that is there stays"
        module = target / "flashinfer/data/aot/of_cascade/of_cascade.so"
        assert module.read_text() == "cascade"
        (line,) = [x for x in (folder / "env.sh").read_text().splitlines() if "FA3" in x]
        assert Path(line.partition("=")[2]).read_text() == "FA3's kernels"

    def test_a_damaged_piece(self, tools, capsys, folder):
        """Guards against installing what was cut off on its way, and the rest against it."""
        (folder / "small.tar.xz").write_bytes(b"cut off")
        code, document = peers(capsys, "install", "--dir", folder, "--only", "small", "fa3")
        assert code == 1
        small, fa3 = document["items"]
        assert small["failure"] == ("small.tar.xz is damaged (another SHA-256 than the manifest's)")
        assert fa3["failure"] is None
        assert tools.calls == []

    def test_mistakes(self, tools, capsys, folder, tmp_path):
        """Guards one line for a bundle of another Python, none, or an item that is not in it."""
        with pytest.raises(InputError, match="holds no 'fa2'; choose of small, fa3, flashinfer"):
            peers(capsys, "install", "--dir", folder, "--only", "fa2")
        with pytest.raises(InputError, match="holds no bundle"):
            peers(capsys, "install", "--dir", tmp_path)
        manifest = folder / "manifest.json"
        manifest.write_text(manifest.read_text().replace(f'"{HERE}"', '"3.99"'))
        with pytest.raises(InputError, match=f"is for Python 3.99, this is {HERE}"):
            peers(capsys, "install", "--dir", folder)


class TestList:
    def test_every_peer_has_a_row(self, capsys):
        """Guards the list: what a CPU lacks has its reason and a way to get it, in one line."""
        code, document = peers(capsys, "--device", "cpu")
        assert (code, document) == peers(capsys, "list", "--device", "cpu")
        assert code == 0
        rows = {(row["op"], row["peer"]): row for row in document["peers"]}
        assert rows.keys() == {(op, name) for op, named in PEERS.items() for name in named}
        sdpa, fa3 = (rows["prefix_attention", name] for name in ("sdpa", "fa3"))
        assert sdpa["absent"] is None
        assert sdpa["version"] == f"torch {torch.__version__}"
        assert fa3["absent"] == "needs a GPU"
        assert all(len(row["get"].splitlines()) == 1 for row in rows.values())

    def test_table(self, capsys):
        """Guards the table against a library that is not there and has no version."""
        parser = Parser()
        command.add_arguments(parser)
        assert command.run(parser.parse_args(["--device", "cpu"])) == 0
        assert "needs a GPU" in capsys.readouterr().out
