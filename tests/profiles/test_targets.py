"""Files that commands write: what is there and is no regular file is refused, before any work.

Guards against waiting for ever for the reader of a FIFO, against rows that vanish in a device, and
against tracebacks for directories, in many places after hours of work.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench
from bench.report import charts
from bench.report import command as report
from bench.rows import jsonl
from bench.validate import command as validate
from bench.validate import histogram
from model.config import TINY
from model.errors import InputError
from model.text.tokenizer import Tokenizer
from model.weights.checkpoint import save_checkpoint
from pacore_sched.sim import plots
from profiles import __main__ as profiles
from profiles.first_light.command import FirstLightRun
from profiles.packs import kernel_pack
from profiles.profilers import proton, tools, torch_trace
from profiles.runs import record
from profiles.static import command as static

pytest.importorskip("matplotlib")

CPU = torch.device("cpu")


def first_light(folder: Path) -> None:
    FirstLightRun(folder, None, 0.0, 0.0, 1)


def save_histogram(folder: Path) -> None:
    counts = [1] * (len(histogram.ALL_EDGES) - 1)
    row = {"op": "a", "impl": "eager", "dtype": "float32", "device": "x", "reference": "fp64"}
    histogram.draw([row | {"histogram": counts, "max_allowed": None}], folder)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.json": lambda folder: jsonl.write_json(folder / "a.json", {}),
    "a.jsonl": lambda folder: jsonl.append(folder / "a.jsonl", [{}]),
    "index.html": report.check,
    "chart.png": lambda folder: charts.save(charts.panels(1, 1, 1.0)[0], folder / "chart.png"),
    "plot.png": lambda folder: plots.finish(charts.panels(1, 1, 1.0)[0], (), folder / "plot.png"),
    "errors-float32.png": save_histogram,
    "rows.jsonl": first_light,
    "environment.json": first_light,
    "log.txt": first_light,
    "summary.txt": first_light,
    "trace.json": lambda folder: torch_trace.trace(pytest.fail, 1, CPU, folder / "trace.json"),
    "x.ncu-rep": lambda folder: tools.run_profiler(["true"], folder / "x.ncu-rep"),
    "pack": lambda folder: kernel_pack.pack(folder / "pack", [], []),
    "pack.partial": lambda folder: kernel_pack.pack(folder / "pack", [], []),
    "config.tmp": lambda folder: save_checkpoint(folder, {"a": torch.zeros(1)}, TINY),
    "tokenizer.json": Tokenizer.byte_level(TINY).save,
    "tokenizer_config.json": Tokenizer.byte_level(TINY).save,
}


@pytest.mark.parametrize("name", WRITERS)
def test_only_regular_files_are_written(name: str, tmp_path: Path):
    """Guards every place that writes a file; /dev/null stands for all that is no regular file."""
    (tmp_path / name).symlink_to("/dev/null")
    with pytest.raises(InputError, match=f"{name} is a pipe, socket or device"):
        WRITERS[name](tmp_path)
    assert (tmp_path / name).is_symlink()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("environment.json", ["record", "--device", "cpu"]),
        ("validate.jsonl", ["validate", "--op", "rms_norm", "--device", "cpu"]),
    ],
)
def test_the_check_is_before_the_work(name: str, words: list[str], tmp_path, monkeypatch):
    """Guards the minutes that were measured before the file was found unfit."""
    monkeypatch.setattr(record, "Supervisor", lambda *_, **__: pytest.fail("it began"))
    monkeypatch.setattr(validate, "validate", lambda *_, **__: iter(pytest.fail, 0))
    (tmp_path / name).symlink_to("/dev/null")
    main = profiles.main if words[0] == "record" else bench.main
    with pytest.raises(InputError, match=f"{name} is a pipe, socket or device"):
        main([*words, "--out", str(tmp_path)])


def test_protons_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Guards the file that Proton writes, on any machine."""
    monkeypatch.setattr(proton, "check_gpu", lambda name: None)
    monkeypatch.setattr(proton, "prepared", lambda *_: pytest.fail("it began"))
    monkeypatch.setattr(proton, "parse_device", lambda name: CPU)
    (tmp_path / "copy.hatchet").symlink_to("/dev/null")
    with pytest.raises(InputError, match="copy.hatchet is a pipe, socket or device"):
        profiles.main(["proton", "--op", "copy", "--out", str(tmp_path)])


def test_a_baseline_is_a_file_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Guards `profiles static --update --baseline notes`, which deleted a file of one line."""
    monkeypatch.setattr(static.static, "sweep", lambda *_, **__: [])
    monkeypatch.setattr(static, "check_compiles", lambda: None)
    (tmp_path / "notes").write_text("text")
    with pytest.raises(InputError, match="notes is no file of rows"):
        profiles.main(["static", "--update", "--baseline", str(tmp_path / "notes")])
    assert (tmp_path / "notes").read_text() == "text"
