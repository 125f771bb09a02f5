"""`batch --replicas` as a command: the output of one engine, a stop and a resumed run, and nothing
left running."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.job_call import Call

pytest.importorskip("ray")

ON_REPLICAS = ("--replicas", "2", "--device", "cpu", "--threads", "1")


@pytest.mark.cli
def test_a_stopped_run_is_resumed(call: Call, tmp_path: Path) -> None:
    """Both together give the file that one engine writes."""
    call.ask(*({"question": f"{n}?"} for n in range(20)))
    alone = tmp_path / "alone.jsonl"
    assert call(out=alone)[0] == 0
    command = [sys.executable, "-m", *call.arguments(*ON_REPLICAS)]
    with subprocess.Popen(command, text=True, stderr=subprocess.PIPE) as first:
        while not (call.journal.exists() and b'"rollout"' in call.journal.read_bytes()):
            assert first.poll() is None, first.communicate()
            time.sleep(0.01)
        first.send_signal(signal.SIGINT)
        assert "continue with the same command and --resume" in first.communicate()[1]
        assert first.returncode == 130
    ended = call.journal.read_text().count('"rollout"')
    assert 0 < ended < 80
    resumed = subprocess.run([*command, "--resume", "--json"], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    report = json.loads(resumed.stdout)
    assert (report["rollouts"], report["resumed_rollouts"]) == (80, ended)
    assert call.out.read_bytes() == alone.read_bytes()
    assert not _ours(tmp_path)


def _ours(folder: Path) -> list[str]:
    """The command lines of processes of Ray that began in this test."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().decode(errors="replace")
            cwd = os.readlink(process / "cwd")
        except OSError:
            continue
        if cwd == str(folder) and ("ray" in line):
            found.append(line)
    return found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replicas", "0"], "--replicas"),
        (["--replicas", "3-2"], "3 is more than 2"),
        (["--replicas", "2", "--ray-address", "nowhere"], "must be HOST:PORT"),
        pytest.param(["--replicas", "100", "--device", "cpu"], "room for", marks=pytest.mark.cli),
    ],
)
def test_bad_options(
    call: Call, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    """One line, before any model is loaded."""
    code, out, err = call(*options)
    assert (code, out) == (2, "") and message in err, err
    assert not call.out.exists() and not call.journal.exists()


def test_without_ray(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = call("--replicas", "2")
    assert code == 2 and err.count("\n") == 1 and "pip install" in err
