"""The format of a bundle, a folder of peers for a machine without the internet: items, pieces.

Each piece is a tar.xz that unpacks by itself and is below a size limit, so that pieces can be
transferred separately. The manifest lists each piece with its SHA-256 and its files; it is
rewritten after every item, so an interrupted run can be resumed.
"""

import hashlib
import json
import lzma
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from model.errors import InputError
from model.text.files import check_target, read_json

MANIFEST = "manifest.json"
SCHEMA = 1
PIECE_BYTES = 60 << 20
BUILT = "flashinfer-modules"  # an item that is compiled, not fetched


@dataclass(frozen=True)
class Item:
    """Wheels to fetch, with versions; with `pattern`, only the matching files of a single wheel."""

    wheels: tuple[str, ...]
    pattern: str | None = None


# All for torch 2.11 with CUDA 13, without torch, Triton and NumPy themselves.
ITEMS: dict[str, Item] = {
    "liger": Item(("liger-kernel==0.8.5", "packaging==26.4")),
    "xformers": Item(("xformers==0.0.35",)),
    "nvtx": Item(("nvtx==0.2.17",)),
    "flashinfer": Item(
        (
            "flashinfer-python==0.6.13",
            "apache-tvm-ffi==0.1.15.post2",
            "nvidia-ml-py==13.615.71",
            "tqdm==4.70.1",
            "tabulate==0.10.0",
            "einops==0.8.2",
            "click==8.5.1",
            "ninja==1.13.2",
            "packaging==26.4",
            "filelock==4.3.1",
            "requests==2.34.2",
            "urllib3==2.8.0",
            "idna==3.20",
            "certifi==2026.10.19.post1",
            "charset-normalizer==3.5.3",
        )
    ),
    "fa3": Item(("vllm==0.25.1",), "vllm/vllm_flash_attn/_vllm_fa3_C*.so"),
    "fa2": Item(("vllm==0.25.1",), "vllm/vllm_flash_attn/_vllm_fa2_C*.so"),
}


class Bundle:
    """A bundle's folder and its manifest.

    Raises InputError for a manifest that this version cannot read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.items: dict[str, dict] = {}  # by name: its "wanted" parts and "pieces"
        self.made_for: dict[str, str] | None = None  # Python version and platform
        path = folder / MANIFEST
        if (manifest := read_json(path)) is not None:
            try:
                schema = manifest["schema"]
                self.items, self.made_for = manifest["items"], manifest["made_for"]
                _check_fields(self.items, self.made_for)
            except (LookupError, TypeError, AttributeError):
                raise InputError(
                    f"{path} is not a manifest of peers, a JSON object with the keys schema,"
                    " made_for and items"
                ) from None
            if schema != SCHEMA:
                raise InputError(f"{path} has schema {schema}; this version reads {SCHEMA}")

    def add(self, name: str, wanted: list[str], pieces: list[dict]) -> None:
        """Add an item to the manifest and write the manifest's file."""
        self.items[name] = {"wanted": wanted, "pieces": pieces}
        document = {"schema": SCHEMA, "made_for": self.made_for, "items": self.items}
        part = self.folder / f"{MANIFEST}.part"
        check_target(part)
        part.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        os.replace(part, self.folder / MANIFEST)

    def holds(self, name: str, wanted: list[str]) -> bool:
        """Whether the bundle has the item with the wanted parts and the right hashes."""
        item = self.items.get(name)
        return bool(item) and item["wanted"] == wanted and not self.damaged(name)

    def damaged(self, name: str) -> str | None:
        """What is wrong with an item's pieces; None if they are intact."""
        for piece in self.items[name]["pieces"]:
            path = self.folder / piece["file"]
            if not path.is_file():
                return f"{piece['file']} is missing or no file"
            if sha256(path) != piece["sha256"]:
                return f"{piece['file']} is damaged (its SHA-256 is not the manifest's)"
        return None

    def unpack(self, name: str, folder: Path) -> list[Path]:
        """Unpack an item into `folder`; returns its files. Raises InputError if it is damaged."""
        if reason := self.damaged(name):
            raise InputError(reason)
        paths = []
        for piece in self.items[name]["pieces"]:
            with tarfile.open(self.folder / piece["file"]) as archive:
                # Refuses files outside the folder; Python has this filter from 3.11.4 on.
                archive.extraction_filter = getattr(tarfile, "data_filter", None)
                archive.extractall(folder)
            paths += [folder / file["file"] for file in piece["holds"]]
        return paths


def pack(folder: Path, stem: Path, limit: int = PIECE_BYTES) -> list[dict]:
    """Pack all files in `folder` as STEM.tar.xz, halved until each piece fits; returns the pieces.

    Raises InputError for a file that is too large for a piece.
    """
    return _pack(sorted(path for path in folder.rglob("*") if path.is_file()), folder, stem, limit)


def _pack(files: Sequence[Path], folder: Path, stem: Path, limit: int) -> list[dict]:
    piece = stem.with_name(f"{stem.name}.tar.xz")
    part = piece.with_name(f"{piece.name}.part")
    # Wheels are already compressed; shared objects shrink to a fraction of their size.
    preset = 0 if all(path.suffix == ".whl" for path in files) else lzma.PRESET_DEFAULT
    check_target(part)
    with tarfile.open(part, "w:xz", preset=preset) as archive:
        for path in files:
            archive.add(path, path.relative_to(folder).as_posix(), filter=_without_owner)
    if part.stat().st_size <= limit:
        os.replace(part, piece)
        holds = [file_entry(path, path.relative_to(folder).as_posix()) for path in files]
        return [file_entry(piece, piece.name) | {"holds": holds}]
    part.unlink()
    if len(files) == 1:
        raise InputError(f"{files[0].name} does not fit into a piece of {limit >> 20} MiB")
    halves = files[: len(files) // 2], files[len(files) // 2 :]
    return [
        entry
        for number, half in enumerate(halves, 1)
        for entry in _pack(half, folder, stem.with_name(f"{stem.name}-{number}"), limit)
    ]


def _check_fields(items: dict[str, dict], made_for: dict[str, str] | None) -> None:
    """Raise LookupError, TypeError or AttributeError for a manifest without the fields in use."""
    for item in items.values():
        pieces = [(piece["file"] + piece["sha256"], piece["holds"]) for piece in item["pieces"]]
        files = ["".join(file["file"] for file in holds) for _, holds in pieces]
        "".join([*item["wanted"], *files])
    if made_for is not None:
        made_for["python"] + made_for["platform"]


def file_entry(path: Path, name: str) -> dict:
    return {"file": name, "bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _without_owner(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """Remove owner and time, so that the same files give the same piece."""
    info.mtime = info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info
