"""A file of compiled kernels, to be carried to a GPU node that runs the same Triton.

Triton names a kernel's entry in its cache by a hash that differs between wheels of one version. A
pack holds the keys (`kernels/compile/cache.py`) and their entries; unpacking puts it
where the Triton of that node looks.
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

from kernels.compile.cache import entry, is_compiled, sources
from kernels.compile.worker import Site
from kernels.runtime.configs import Gpu
from model.errors import InputError
from pacore_sched.engine.compile_ahead import Summary, compile_ahead

MANIFEST = "manifest.json"
KEPT = (".cubin", ".json")  # of an entry; the intermediate languages are left out


def pack(path: Path, sites: Sequence[Site], gpus: Sequence[Gpu]) -> Summary:
    """Compile what `sites` launch on `gpus` and write it to `path`."""
    knobs = triton.knobs
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir, knobs.compilation.store_binary_only = folder, True
        done = compile_ahead(sites, gpus)
        keys = [key for key in done.keys if is_compiled(entry(key))]
        _write(path, keys, sorted({gpu.arch for gpu in gpus}))
    return done


def unpack(path: Path) -> tuple[int, int]:
    """Put a pack's kernels into Triton's cache: how many it holds, and how many were new here.

    Raises InputError for a file that is no pack, or one made by another Triton or ptxas; warns of
    one made from another text of the kernels.
    """
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
    except Exception as error:  # whatever another file, or half of one, leads to
        raise InputError(f"{path} is no file of `profiles kernels pack`: {error}") from error
    for folder in new:
        _list_files(folder)
    return len(folders), len(new)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    if file is None:
        raise ValueError(f"{member.name} is no file")
    return file.read()


def _write(path: Path, keys: Sequence[str], archs: Sequence[int]) -> None:
    """Entries in the order of the keys: neighbours compress well."""
    manifest = {"triton": triton.__version__, "archs": archs, "keys": keys}
    manifest["sources"] = sources("kernels")
    partial = path.with_name(path.name + ".partial")
    with tarfile.open(partial, "w:xz") as archive:
        _add(archive, MANIFEST, json.dumps(manifest).encode())
        for index, key in enumerate(keys):
            for file in _files(entry(key)):
                _add(archive, f"{index}/{file.name}", file.read_bytes())
    partial.replace(path)


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _files(folder: Path) -> list[Path]:
    files = (file for file in folder.iterdir() if not file.name.startswith("__grp__"))
    return sorted(file for file in files if file.suffix in KEPT)


def _check(path: Path, manifest: dict) -> None:
    """Refuse what this Triton would never look up, and warn of what it may not."""
    if manifest["triton"] != triton.__version__:
        raise InputError(
            f"{path} was packed with Triton {manifest['triton']} and this is"
            f" {triton.__version__}: pack with the version that is to launch the kernels"
        )
    if manifest["sources"] != sources("kernels"):
        text = f"{path} was packed from other kernels: what has changed is compiled at first use"
        warnings.warn(text, stacklevel=3)
    known = tuple(make_backend(GPUTarget("cuda", arch, 32)).hash() for arch in manifest["archs"])
    environment = str(sorted(get_cache_invalidating_env_vars().items()))
    for key in manifest["keys"]:
        of_backend = key.partition("-")[2]  # after the hash of the source
        if not (of_backend.startswith(known) and key.endswith(environment)):
            raise InputError(
                f"{path} was packed with another ptxas or other variables of Triton than here:"
                " nothing would be found"
            )


def _list_files(folder: Path) -> None:
    """Write the entry's group, last, with absolute paths as Triton has them."""
    files = _files(folder)
    group = next(file for file in files if file.suffix == ".json")
    paths = {file.name: str(file) for file in files}
    (folder / f"__grp__{group.name}").write_text(json.dumps({"child_paths": paths}))
