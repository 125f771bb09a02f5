"""GPU tests as supervised tasks, for what the op table does not show.

They cover graphs over changing plans, work from several threads, races and bits. Without pytest,
which a GPU node may lack, there are no such tasks.
"""

from pathlib import Path

from profiles.runs.task import Row

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    "tests/kernels/prefix_attention/test_prefix_attention_triton.py::test_real_shapes",
    "tests/kernels/prefix_attention/test_prefix_attention_triton.py::test_bits_of_real_shapes",
    "tests/kernels/test_rotary_attention.py::test_real_shapes",
    "tests/pacore_sched/engine/test_decode_graph.py",
    "tests/model/test_cuda_graph.py",
    "tests/kernels/prefix_attention/test_prefix_advance.py",
    "tests/kernels/sampling/test_sampling_triton.py::test_replay_of_a_graph",
    "tests/bench/measure/test_timing.py",
    "tests/kernels/test_vision_attention_triton.py::test_real_shapes",
    "tests/model/vision/test_vision_graph.py",
)
QUIET = ["-q", "--no-header", "-p", "no:cacheprovider", "-m", "gpu and not slow_gpu"]


class _Collected:
    """A pytest plugin that collects the tests' names and the outcome of each."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.failure: str | None = None
        self.skipped: str | None = None

    def pytest_collection_finish(self, session) -> None:  # noqa: ANN001 - pytest's own
        self.names = [item.nodeid for item in session.items]

    def pytest_runtest_logreport(self, report) -> None:  # noqa: ANN001
        if report.failed:
            lines = [line for line in report.longreprtext.splitlines() if line.startswith("E  ")]
            self.failure = (lines or ["E  failed"])[0].removeprefix("E").strip()
            print(report.longreprtext)
        if report.skipped:
            self.skipped = str(report.longrepr[-1])


def collected() -> list[str]:
    """The names of the tests; none without pytest."""
    try:
        import pytest  # noqa: F401
    except ImportError:
        return []
    if not (ROOT / "tests").is_dir():
        return []
    plugin = _Collected()
    _pytest(["--collect-only", *(f"{ROOT}/{name}" for name in TESTS)], plugin)
    return plugin.names


def run_test(name: str) -> Row:
    """Run one test in this process and return its row."""
    plugin = _Collected()
    code = _pytest([f"{ROOT}/{name}"], plugin)
    if not plugin.names and not plugin.failure:
        plugin.failure = f"pytest ran no test: exit code {code}"
    return {
        "op": "test",
        "case": name,
        "impl": None,
        "dtype": None,
        "failure": plugin.failure,
        "skipped": plugin.skipped,
    }


def _pytest(arguments: list[str], plugin: _Collected) -> int:
    import pytest

    return int(pytest.main([*QUIET, "--rootdir", str(ROOT), *arguments], plugins=[plugin]))
