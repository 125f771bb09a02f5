"""Kernel packs: files of compiled kernels for a GPU node with the same Triton.

Triton names a kernel's cache entry by a hash that differs between wheels of one version. A pack
therefore holds the keys (`kernels/compile/cache.py`) and their entries; unpacking puts each entry
where that node's Triton looks for it.
"""

import io
import json
import tarfile
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from kernels.compile.cache import entry, is_compiled, source_hash
from kernels.compile.worker import Site
from kernels.runtime.configs import Gpu
from model.errors import InputError
from model.text.files import check_regular, check_target
from pacore_sched.engine.compile_ahead import Summary, compile_ahead

MANIFEST = "manifest.json"
KEPT = (".cubin", ".json")  # the files of an entry that are packed; intermediate languages are not


def pack(path: Path, sites: Sequence[Site], gpus: Sequence[Gpu]) -> Summary:
    """Compile the kernels that `sites` launch on `gpus` and write them to `path`."""
    partial = path.with_name(path.name + ".partial")
    for file in (path, partial):
        check_target(file)
    knobs = triton.knobs
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir, knobs.compilation.store_binary_only = folder, True
        summary = compile_ahead(sites, gpus)
        keys = [key for key in summary.keys if is_compiled(entry(key))]
        _write(partial, keys, sorted({gpu.arch for gpu in gpus}))
    partial.replace(path)
    return summary


def unpack(path: Path) -> tuple[int, int]:
    """Put a pack's kernels into Triton's cache. Returns their number, and how many were new.

    Raises InputError for a file that is no pack or comes from another Triton or ptxas. Warns if the
    kernels' sources have changed.
    """
    check_regular(path)
    try:
        with tarfile.open(path) as archive:
            members = ((member.name, _content(archive, member)) for member in archive)
            manifest = json.loads(next(members)[1])
            _check(path, manifest)
            folders = [entry(key) for key in manifest["keys"]]
            new = {folder for folder in folders if not is_compiled(folder)}
            for name, content in members:
                index, name = name.split("/")
                if (folder := folders[int(index)]) in new:
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(content)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot unpack {path}: {error.strerror or error}") from error
    except Exception as error:  # tarfile's text has a line for each method of compression
        text = f"{path} is not a file of `profiles kernels pack`, or is only a part of one"
        raise InputError(text) from error
    for folder in new:
        _list_files(folder)
    return len(folders), len(new)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name} is not a file")
    return file.read()


def _write(path: Path, keys: Sequence[str], archs: Sequence[int]) -> None:
    """Write the entries in the order of their keys: neighbours compress well."""
    manifest = {"triton": triton.__version__, "archs": archs, "keys": keys}
    manifest["sources"] = source_hash("kernels")
    with tarfile.open(path, "w:xz") as archive:
        _add(archive, MANIFEST, json.dumps(manifest).encode())
        for index, key in enumerate(keys):
            for file in _files(entry(key)):
                _add(archive, f"{index}/{file.name}", file.read_bytes())


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _files(folder: Path) -> list[Path]:
    files = (file for file in folder.iterdir() if not file.name.startswith("__grp__"))
    return sorted(file for file in files if file.suffix in KEPT)


def _check(path: Path, manifest: dict) -> None:
    """Refuse a pack that this Triton would never use; warn if it may not use some of it."""
    if manifest["triton"] != triton.__version__:
        raise InputError(
            f"{path} was packed with Triton {manifest['triton']}, but this is"
            f" {triton.__version__}: pack with the version that will launch the kernels"
        )
    if manifest["sources"] != source_hash("kernels"):
        text = f"{path} was packed from other sources: changed kernels are compiled at first use"
        warnings.warn(text, stacklevel=3)
    known = tuple(make_backend(GPUTarget("cuda", arch, 32)).hash() for arch in manifest["archs"])
    environment = str(sorted(get_cache_invalidating_env_vars().items()))
    for key in manifest["keys"]:
        backend_key = key.partition("-")[2]  # after the hash of the source
        if not (backend_key.startswith(known) and key.endswith(environment)):
            raise InputError(
                f"{path} was packed with another ptxas, or with other environment variables of"
                " Triton: no kernel would be found"
            )


def _list_files(folder: Path) -> None:
    """Write the entry's group file, last, with absolute paths as Triton does."""
    files = _files(folder)
    group = next(file for file in files if file.suffix == ".json")
    paths = {file.name: str(file) for file in files}
    (folder / f"__grp__{group.name}").write_text(json.dumps({"child_paths": paths}))
