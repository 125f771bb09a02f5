"""Checks for Hugging Face's distribution `kernels`, whose top-level folder has the name of ours.

pip silently installs both into one folder: the later `kernels/__init__.py` replaces the other, and
uninstalling either deletes it. An editable install of ours comes after site-packages on the path,
so `import kernels` then finds theirs. The checks do not import it, which would take seconds.
"""

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

OURS = Path(__file__).resolve().parents[2] / "kernels" / "__init__.py"
MARK = "STEP3-VL-10B"  # only our `__init__.py` contains it
ADVICE = "install step3vl-pacore in a separate virtual environment"


def error() -> str | None:
    """What prevents `import kernels` from finding this repository's complete package, or None."""
    if not OURS.exists():
        return (
            f"{OURS} is missing, perhaps since Hugging Face's `kernels` was uninstalled:"
            f" install step3vl-pacore again with --force-reinstall --no-deps, and {ADVICE}"
        )
    spec = find_spec("kernels")
    origin = spec.origin if spec else None
    if origin and Path(origin).resolve() == OURS and MARK in OURS.read_text(encoding="utf-8"):
        return None
    return (
        f"`import kernels` finds {origin}, which belongs to another distribution (Hugging Face's?)"
        f" and not to step3vl-pacore: {ADVICE}"
    )


def warning() -> str | None:
    """What does not work if ours is complete and theirs is installed too; None if it is not."""
    try:
        version = metadata.version("kernels")
    except metadata.PackageNotFoundError:
        return None
    return (
        f"Hugging Face's `kernels` {version} is installed too, but `import kernels` finds"
        f" step3vl-pacore's package, so get_kernel cannot be imported; {ADVICE}"
    )
