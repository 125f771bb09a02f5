"""`python -m pacore_sched batch` and `sample` in this process, with captured output."""

import json
import sys
from pathlib import Path

import pytest

from model.process.run import run_command
from pacore_sched.__main__ import main

TINY = ["--model", "tiny", "--max-tokens", "8", "--kv-tokens", "4096"]
QUESTIONS = [{"question": "Who?"}, {"id": "when", "question": "When?"}, {"question": "Why?"}]


class Call:
    """The command in this process, on a file of questions in `folder`."""

    def __init__(
        self, folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture
    ) -> None:
        self.folder, self._patch, self._capture = folder, patch, capture
        self.questions, self.out = folder / "questions.jsonl", folder / "results.jsonl"
        self.journal = folder / "results.journal.jsonl"
        self.command = "batch"
        self.ask(*QUESTIONS)

    def ask(self, *lines: object) -> None:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        self.questions.write_text("\n".join(texts))

    def arguments(self, *more: str, out: Path | None = None) -> list[str]:
        paths = [str(self.questions), "--out", str(out or self.out)]
        widths = ["--widths", "3"] if self.command == "batch" else ["--n", "3"]
        return ["pacore_sched", self.command, *paths, *widths, *TINY, *more]

    def __call__(self, *more: str, out: Path | None = None) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)"""
        self._patch.setattr(sys, "argv", self.arguments(*more, out=out))
        with pytest.raises(SystemExit) as exit:
            run_command(main)
        return exit.value.code, *self._capture.readouterr()

    def results(self, out: Path | None = None) -> list[dict]:
        return [json.loads(line) for line in (out or self.out).read_text().splitlines()]
