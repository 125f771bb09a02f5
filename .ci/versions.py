"""`python3 .ci/versions.py`: run the tests with other releases of Python and PyTorch than CI's.

Each pair gets a clone of HEAD with a separate environment (5 GB, kept under --folder for the next
run), where `make setup`, `make test` and `profiles static --quick` run. The result replaces the
pair's line in .ci/versions.jsonl; `python -m profiles tables --write` then copies it to
docs/results.md. Needs only the standard library, and every Python by its name on the PATH.
Exit code 1 if a pair failed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / ".ci" / "versions.jsonl"

# Every Python with the oldest and the newest PyTorch, and each PyTorch in between once.
PAIRS = (
    ("python3.11", "2.11.0"),
    ("python3.11", "2.13.0"),
    ("python3.11", "2.15.0"),
    ("python3.12", "2.11.0"),
    ("python3.12", "2.12.1"),
    ("python3.12", "2.15.0"),
    ("python3.13", "2.11.0"),
    ("python3.13", "2.14.1"),
    ("python3.13", "2.15.0"),
)

INSTALLED = """
import json, platform, torch, triton, numpy
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__,
                  "triton": triton.__version__, "numpy": numpy.__version__}))
"""


def main() -> int:
    """Run the pairs of the command line, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    names = ", ".join("=".join(pair) for pair in PAIRS)
    parser.add_argument(
        "pair", nargs="*", metavar="PYTHON=TORCH", type=_pair, help=f"default: {names}"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=ROOT / "build" / "versions",
        help="where the clones are (default: build/versions)",
    )
    parser.add_argument("--setup", action="store_true", help="only set up the environments")
    options = parser.parse_args()
    failed = 0
    for python, torch in options.pair or PAIRS:
        clone = _clone(options.folder / f"{python}-torch{torch}")
        environment = {**os.environ, "PYTHON": python, "TORCH": torch}
        print(f"{python} with PyTorch {torch}: {clone}", flush=True)
        if subprocess.run(["make", "setup"], cwd=clone, env=environment).returncode != 0:
            failed += 1
        elif not options.setup:
            row = _row(clone, environment)
            _save(row)
            print(json.dumps(row), flush=True)
            failed += not row["ok"]
    return int(failed > 0)


def _pair(text: str) -> tuple[str, str]:
    python, sign, torch = text.partition("=")
    if not (python and sign and torch):
        raise argparse.ArgumentTypeError(f"{text!r} is not a pair such as python3.12=2.11.0")
    return python, torch


def _clone(folder: Path) -> Path:
    """Clone HEAD to `folder`, or update the clone that is there."""
    if not folder.exists():
        subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
    fetch = ["git", "-C", folder, "fetch", "-q", ROOT, "HEAD"]
    subprocess.run(fetch, check=True)
    subprocess.run(["git", "-C", folder, "reset", "-q", "--hard", "FETCH_HEAD"], check=True)
    return folder


def _row(clone: Path, environment: dict) -> dict:
    python = clone / ".venv" / "bin" / "python"
    tests = _run(["make", "test"], clone, environment)
    static = _run([python, "-m", "profiles", "static", "--quick"], clone, environment)
    last_line = tests.stdout.rstrip().rpartition("\n")[2]
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) ([a-z]+?)s?\b", last_line)}
    head = _run(["git", "rev-parse", "--short=12", "HEAD"], clone, environment)
    return {
        **json.loads(_run([python, "-c", INSTALLED], clone, environment).stdout),
        **{kind: counts.get(kind, 0) for kind in ("passed", "failed", "skipped", "error")},
        "static": static.stdout.rstrip().rpartition("\n")[2],
        "ok": tests.returncode == 0 and static.returncode == 0,
        "commit": head.stdout.strip(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _run(command: list, clone: Path, environment: dict) -> subprocess.CompletedProcess:
    done = subprocess.run(command, cwd=clone, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        print(done.stdout, flush=True)
    return done


def _save(row: dict) -> None:
    """Write the row to the file, replacing an older one of the same Python and PyTorch."""

    def key(row: dict) -> tuple:
        names = ("python", "torch")
        return tuple([int(part) for part in re.findall(r"\d+", row[name])[:3]] for name in names)

    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    rows = [old for old in map(json.loads, lines) if key(old) != key(row)]
    lines = [json.dumps(row) for row in sorted([*rows, row], key=key)]
    ROWS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
