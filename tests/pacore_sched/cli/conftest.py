"""The fixture of tests of `batch` and `sample`."""

from pathlib import Path

import pytest

from tests.support.job_call import Call


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Call:
    return Call(tmp_path, monkeypatch, capsys)
