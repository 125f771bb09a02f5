"""Bundles of peers for a machine without the internet: packing, resuming, installing.

pip, the compilers and FlashInfer's build are fakes; archives, hashes and manifests are real.
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

from bench import model_peers
from bench.bundles import bundle, command, install, prepare
from bench.bundles.bundle import BUILT, Bundle, Item, pack
from bench.bundles.prepare import ItemError
from bench.suite import PEERS
from model.errors import InputError
from model.terminal import Parser

OBJECT = "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"
ITEMS = {
    "small": Item(("small==1.0", "its-need==2.0")),
    "fa3": Item(("vllm==0.1",), "vllm/vllm_flash_attn/_vllm_fa3_C*.so"),
    "flashinfer": Item(("flashinfer-python==0.6",)),
}
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


class FakeTools:
    """A fake `run_tool`: logs calls, and fails those with a word in `broken`."""

    def __init__(self):
        self.calls, self.broken = [], set()

    def __call__(self, call, env=None):
        self.calls.append(call)
        for word in self.broken:
            if any(word in part for part in call):
                raise ItemError(f"no {word} today")
        if "download" in call:
            self.download(Path(call[call.index("--dest") + 1]), call[-1])
        elif "bench.bundles.flashinfer_modules" in call:
            path = Path(env["FLASHINFER_WORKSPACE_BASE"]) / f"of_{call[-1]}.so"
            path.write_text(call[-1])
            return f"other output\n{path}\n"
        return ""

    def download(self, folder, requirement):
        with zipfile.ZipFile(folder / f"{requirement.replace('==', '-')}-any.whl", "w") as wheel:
            wheel.writestr("metadata", requirement)
            if requirement.startswith("vllm"):
                wheel.writestr(OBJECT, "FA3's kernels")
                wheel.writestr("vllm/large.so", "another file")

    def calls_with(self, word):
        return [call for call in self.calls if word in call]


@pytest.fixture
def tools(monkeypatch):
    fake = FakeTools()
    for module in (prepare, install):
        monkeypatch.setattr(module, "run_tool", fake)
    monkeypatch.setattr(prepare, "ITEMS", ITEMS)
    monkeypatch.setattr(command, "ITEMS", ITEMS)
    monkeypatch.setattr(prepare, "_cuda_home", lambda: Path("cuda"))
    return fake


def peers(capsys, *arguments):
    """Exit code and document of `python -m bench peers ARGUMENTS --json`."""
    parser = Parser()
    command.add_arguments(parser)
    code = command.run(parser.parse_args([*map(str, arguments), "--json"]))
    return code, json.loads(capsys.readouterr().out)


def run_prepare(capsys, folder, *arguments):
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
        """Guards separate transfers: no piece is above the limit or needs another piece."""
        source = tmp_path / "source"
        for n in range(5):
            path = source / f"folder-{n % 2}" / f"{n}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(os.urandom(1000))
        entries = pack(source, tmp_path / "item", limit=2600)
        assert len(entries) > 2
        unpacked = {}
        for entry in entries:
            piece = tmp_path / entry["file"]
            assert piece.stat().st_size == entry["bytes"] <= 2600
            assert hashlib.sha256(piece.read_bytes()).hexdigest() == entry["sha256"]
            with tarfile.open(piece) as archive:
                archive.extraction_filter = getattr(tarfile, "data_filter", None)
                archive.extractall(tmp_path / piece.stem)
            for file in entry["holds"]:
                data = (tmp_path / piece.stem / file["file"]).read_bytes()
                unpacked[file["file"]] = data
                assert hashlib.sha256(data).hexdigest() == file["sha256"]
        assert unpacked == {
            path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*.bin")
        }
        assert {path.name for path in tmp_path.glob("item*.xz*")} == {e["file"] for e in entries}

    def test_a_file_that_never_fits(self, tmp_path):
        """Guards against a piece above the limit, and against endless halving."""
        (tmp_path / "large.bin").write_bytes(os.urandom(5000))
        with pytest.raises(InputError, match="large.bin does not fit"):
            pack(tmp_path, tmp_path / "item", limit=3000)

    def test_shared_objects_shrink(self, tmp_path):
        """Guards compression of shared objects, whose kernels repeat over megabytes."""
        (tmp_path / "a.so").write_bytes(2 * os.urandom(1 << 20))
        (entry,) = pack(tmp_path, tmp_path / "item")
        assert entry["bytes"] < 1.1 * 2**20


class TestPrepare:
    def test_all_of_it(self, tools, capsys, tmp_path):
        """Guards the bundle: every wheel at its version, of FA3 only the object, no leftovers."""
        code, rows = run_prepare(capsys, tmp_path)
        assert code == 0
        assert names_in(tmp_path / "small.tar.xz") == ["its-need-2.0-any.whl", "small-1.0-any.whl"]
        assert names_in(tmp_path / "fa3.tar.xz") == ["_vllm_fa3_C.abi3.so"]
        assert rows["fa3"]["bytes"] == (tmp_path / "fa3.tar.xz").stat().st_size
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "fa3.tar.xz", "flashinfer.tar.xz", "manifest.json", "small.tar.xz",
        ]  # fmt: skip
        for call in tools.calls_with("download"):
            assert "--no-deps" in call and "--only-binary=:all:" in call
            assert call[call.index("--python-version") + 1] == HERE

    def test_platforms(self):
        """Guards wheels of older manylinux tags, which pip does not try, and against newer ones."""
        options = prepare._pip_options(prepare.Target(platform="manylinux_2_28_x86_64"))
        platforms = options[options.index("--platform") + 1 :: 2]
        assert platforms[0] == "manylinux_2_28_x86_64"
        assert {"manylinux_2_17_x86_64", "manylinux2014_x86_64"} <= set(platforms)
        assert "manylinux_2_31_x86_64" not in platforms

    def test_intact_items_are_kept(self, tools, capsys, tmp_path, monkeypatch):
        """Guards resuming: only items with a wrong hash or a new version are fetched again."""
        run_prepare(capsys, tmp_path)
        tools.calls.clear()
        code, rows = run_prepare(capsys, tmp_path)
        assert code == 0 and tools.calls == []
        assert all(row["kept"] for row in rows.values())
        (tmp_path / "fa3.tar.xz").write_bytes(b"cut off")
        monkeypatch.setattr(prepare, "ITEMS", ITEMS | {"small": Item(("small==1.1",))})
        code, rows = run_prepare(capsys, tmp_path)
        assert [call[-1] for call in tools.calls] == ["small==1.1", "vllm==0.1"]
        assert names_in(tmp_path / "fa3.tar.xz") == ["_vllm_fa3_C.abi3.so"]
        assert names_in(tmp_path / "small.tar.xz") == ["small-1.1-any.whl"]

    def test_one_failure_does_not_affect_others(self, tools, capsys, tmp_path):
        """Guards fetched items: they are in the manifest, and only the rest is fetched again."""
        tools.broken = {"its-need"}
        code, rows = run_prepare(capsys, tmp_path)
        assert code == 1
        assert rows["small"]["failure"] == "no its-need today"
        assert rows["fa3"]["failure"] is rows["flashinfer"]["failure"] is None
        assert Bundle(tmp_path).items.keys() == {"fa3", "flashinfer"}
        tools.broken, tools.calls = set(), []
        code, rows = run_prepare(capsys, tmp_path)
        assert code == 0
        assert [call[-1] for call in tools.calls] == ["its-need==2.0"], "small==1.0 is present"

    def test_a_wheel_without_the_object(self, tools, capsys, tmp_path, monkeypatch):
        """Guards against an empty piece when a wheel's layout changes."""
        changed = ITEMS | {"fa3": Item(("vllm==0.1",), "vllm/elsewhere/*.so")}
        monkeypatch.setattr(prepare, "ITEMS", changed)
        code, rows = run_prepare(capsys, tmp_path)
        assert code == 1
        assert "contains no vllm/elsewhere/*.so" in rows["fa3"]["failure"]
        assert not (tmp_path / "fa3.tar.xz").exists()

    def test_built_modules(self, tools, capsys, tmp_path):
        """Guards minutes of nvcc: built modules are kept if another fails or is added later."""
        tools.broken = {"page"}
        code, rows = run_prepare(capsys, tmp_path, "--only", BUILT, "--build", "cascade", "page")
        assert code == 1
        assert rows[BUILT]["failure"] == "page: no page today"
        assert names_in(tmp_path / f"{BUILT}.tar.xz") == ["of_cascade/of_cascade.so"]
        tools.broken, tools.calls = set(), []
        code, rows = run_prepare(capsys, tmp_path, "--only", BUILT, "--build", "page", "norm")
        assert code == 0
        assert [c[-1] for c in tools.calls_with("bench.bundles.flashinfer_modules")] == [
            "page",
            "norm",
        ]
        piece = tmp_path / f"{BUILT}.tar.xz"
        assert names_in(piece) == [f"of_{n}/of_{n}.so" for n in ("cascade", "norm", "page")]
        tools.calls.clear()
        run_prepare(capsys, tmp_path, "--only", BUILT, "--build", "cascade", "--arch", "8.0")
        assert names_in(piece) == ["of_cascade/of_cascade.so"], "no module of another architecture"

    def test_mistakes(self, tools, capsys, tmp_path):
        """Guards the one-line messages, which list the choices."""
        with pytest.raises(InputError, match="unknown item 'fa9'; choose one of small, fa3, fla"):
            run_prepare(capsys, tmp_path, "--only", "fa9")
        with pytest.raises(InputError, match="unknown module 'x'; choose one of cascade, page"):
            run_prepare(capsys, tmp_path, "--build", "x")
        run_prepare(capsys, tmp_path, "--only", "small")
        with pytest.raises(InputError, match=f"is for Python {HERE} on any; choose another --dir"):
            peers(capsys, "prepare", "--dir", tmp_path, "--python", "3.99")
        for wrong in (
            "[]",
            "[" * 100_000,
            "{}",
            '{"schema": 1, "made_for": {"python": 3, "platform": "any"}, "items": {}}',
            '{"schema": 1, "made_for": null, "items": {"small": {"wanted": [], "pieces": [{}]}}}',
            '{"schema": 1, "made_for": null, "items": {"small": {"wanted": [1], "pieces": []}}}',
        ):
            (tmp_path / "manifest.json").write_text(wrong)
            with pytest.raises(InputError, match="manifest"):
                run_prepare(capsys, tmp_path)

    def test_torch_is_not_among_them(self):
        """Guards the GPU machine's torch and Triton, which --no-deps alone does not."""
        names = {
            wheel.partition("==")[0] for item in bundle.ITEMS.values() for wheel in item.wheels
        }
        assert not names & {"torch", "triton", "numpy"}
        assert all("==" in wheel for item in bundle.ITEMS.values() for wheel in item.wheels)

    @pytest.mark.cli
    def test_a_tool_that_fails(self):
        """Guards an item's reason: the line with the error among pages of output."""
        script = "print('RuntimeError: see below\\nx.h: fatal error: no such file'); exit('end')"
        with pytest.raises(ItemError, match="^x.h: fatal error: no such file$"):
            prepare.run_tool([sys.executable, "-c", script])
        with pytest.raises(ItemError, match="no-such-tool"):
            prepare.run_tool(["no-such-tool"])
        assert prepare.run_tool([sys.executable, "-c", "print(1)"]) == "1\n"


class TestInstall:
    @pytest.fixture
    def folder(self, tools, capsys, tmp_path):
        run_prepare(capsys, tmp_path / "bundle", "--build", "cascade")
        tools.calls.clear()
        return tmp_path / "bundle"

    def test_all_of_it(self, tools, capsys, folder, tmp_path):
        """Guards the offline install: pip without index or dependencies, FA3's path, modules."""
        target = tmp_path / "site"
        code, document = peers(capsys, "install", "--dir", folder, "--target", target)
        assert code == 0
        assert [row["item"] for row in document["items"]][-1] == BUILT, (
            "after FlashInfer, which contains it"
        )
        assert len(tools.calls) == 2, "FA3 is not a package"
        for call in tools.calls:
            assert "--no-index" in call and "--no-deps" in call
            assert list(Path(call[call.index("--find-links") + 1]).glob("*.whl"))
        assert tools.calls[0][-2:] == ["small==1.0", "its-need"], "an installed dependency is kept"
        module = target / "flashinfer/data/aot/of_cascade/of_cascade.so"
        assert module.read_text() == "cascade"
        (line,) = [x for x in (folder / "env.sh").read_text().splitlines() if "FA3" in x]
        assert Path(line.partition("=")[2]).read_text() == "FA3's kernels"

    def test_a_damaged_piece(self, tools, capsys, folder):
        """Guards against installing a truncated piece; other items are installed."""
        (folder / "small.tar.xz").write_bytes(b"cut off")
        code, document = peers(capsys, "install", "--dir", folder, "--only", "small", "fa3")
        assert code == 1
        small, fa3 = document["items"]
        assert small["failure"] == ("small.tar.xz is damaged (its SHA-256 is not the manifest's)")
        assert fa3["failure"] is None
        assert tools.calls == []

    def test_mistakes(self, tools, capsys, folder, tmp_path):
        """Guards the one-line messages: no bundle, another Python's, or an unknown item."""
        with pytest.raises(InputError, match="contains no 'fa2'; choose one of small, fa3, flash"):
            peers(capsys, "install", "--dir", folder, "--only", "fa2")
        with pytest.raises(InputError, match="contains no bundle"):
            peers(capsys, "install", "--dir", tmp_path)
        manifest = folder / "manifest.json"
        manifest.write_text(manifest.read_text().replace(f'"{HERE}"', '"3.99"'))
        with pytest.raises(InputError, match=f"is for Python 3.99, this is {HERE}"):
            peers(capsys, "install", "--dir", folder)


class TestList:
    def test_every_peer_has_a_row(self, capsys):
        """Guards the list: an unusable peer has a reason and a way to get it, in one line."""
        code, document = peers(capsys, "--device", "cpu")
        assert (code, document) == peers(capsys, "list", "--device", "cpu")
        assert code == 0
        rows = {(row["op"], row["peer"]): row for row in document["peers"]}
        of_ops = {(op, name) for op, named in PEERS.items() for name in named}
        assert rows.keys() == of_ops | {("whole model", name) for name in model_peers.PEERS}
        sdpa, fa3 = (rows["prefix_attention", name] for name in ("sdpa", "fa3"))
        assert sdpa["absent"] is None
        assert sdpa["version"] == f"torch {torch.__version__}"
        assert fa3["absent"] == "needs a GPU"
        assert all(len(row["get"].splitlines()) == 1 for row in rows.values())

    def test_table(self, capsys):
        """Guards the table against a library that is not installed and has no version."""
        parser = Parser()
        command.add_arguments(parser)
        assert command.run(parser.parse_args(["--device", "cpu"])) == 0
        assert "needs a GPU" in capsys.readouterr().out
