"""Hugging Face's distribution `kernels` installs a top-level folder `kernels/`, as ours does.

pip puts both into one folder without a word: the later `kernels/__init__.py` replaces the other,
and uninstalling either deletes it. An editable install of ours comes after site-packages on the
path, so there `import kernels` finds theirs. Nothing is imported to find out: theirs takes seconds.
"""

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

OURS = Path(__file__).resolve().parents[1] / "kernels" / "__init__.py"
MARK = "STEP3-VL-10B"  # which only the text of ours has
ADVICE = "give step3vl-pacore a virtual environment of its own"


def error() -> str | None:
    """Why no code of ours can be relied on: `import kernels` does not find ours, or not whole."""
    if not OURS.exists():
        return (
            f"{OURS} is gone, as after uninstalling Hugging Face's `kernels`:"
            f" install step3vl-pacore again with --force-reinstall --no-deps, and {ADVICE}"
        )
    spec = find_spec("kernels")
    found = spec.origin if spec else None
    if found and Path(found).resolve() == OURS and MARK in OURS.read_text(encoding="utf-8"):
        return None
    return (
        f"`import kernels` finds {found}, which is another distribution's (Hugging Face's?) and not"
        f" step3vl-pacore's: {ADVICE}"
    )


def warning() -> str | None:
    """What does not work where ours is whole and theirs is installed too."""
    try:
        version = metadata.version("kernels")
    except metadata.PackageNotFoundError:
        return None
    return (
        f"Hugging Face's `kernels` {version} is installed too, and its get_kernel cannot be"
        f" imported: the package of that name is step3vl-pacore's; {ADVICE}"
    )
