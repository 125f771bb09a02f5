"""A headless Chromium for tests of the page."""

import shutil
import subprocess
import tempfile

import pytest

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync")


def browse(url: str, seconds: float = 3) -> tuple[str, list[str]]:
    """A page after its scripts have run for so long, as HTML, and the lines on its console.

    The browser skips what scripts wait for: the seconds take less.
    """
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("neither chromium nor google-chrome is on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        flags = (f"--user-data-dir={folder}", f"--virtual-time-budget={int(1000 * seconds)}")
        done = subprocess.run(
            [chromium, *FLAGS, *flags, "--enable-logging=stderr", "--dump-dom", url],
            capture_output=True,
            text=True,
            timeout=120,
        )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
