"""--threads: its limits, and that commands compute with it."""

import pytest
import torch

from bench import __main__ as bench
from bench.cli import commands
from model import terminal
from model.errors import InputError
from pacore_sched import __main__ as pacore_sched

ROOFLINE = ["roofline", "--device", "cpu", "--json"]
ASK = ["ask", "Hi", "--model", "tiny", "--device", "cpu", "--widths", "", "--max-tokens", "1"]


@pytest.fixture
def two_cpus(monkeypatch):
    """Two usable CPUs on any machine; the number of threads afterwards as before."""
    before = torch.get_num_threads()
    monkeypatch.setattr(terminal, "usable_cpus", lambda: 2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("main", "words"), [(bench.main, ROOFLINE), (pacore_sched.main, ASK)])
@pytest.mark.parametrize("count", ["0", "3", "-1", "two", "1.5"])
def test_only_as_many_threads_as_cpus(main, words, count, two_cpus):
    """Guards against threads that take turns on a CPU, and torch's own error for 0."""
    text = "is not an integer from 1 to 2, the number of CPUs that this process may use"
    with pytest.raises(InputError, match=f"--threads: .*{count}.* {text}"):
        main([*words, f"--threads={count}"])


@pytest.mark.parametrize("count", [1, 2])
def test_commands_compute_with_them(count, two_cpus, monkeypatch):
    """Guards the option against being read and forgotten, or applied after the model has run."""
    seen = []

    def ceiling(device, dtype):
        seen.append(torch.get_num_threads())
        return {"op": "roofline", "failure": "stop"}

    monkeypatch.setattr(commands, "ceiling", ceiling)
    bench.main([*ROOFLINE, "--threads", str(count)])
    assert set(seen) == {count}
    torch.set_num_threads(3 - count)
    assert pacore_sched.main([*ASK, "--threads", str(count)]) == 0
    assert torch.get_num_threads() == count


def test_without_the_option_the_number_stays(two_cpus):
    """Guards OMP_NUM_THREADS and PyTorch's own number."""
    torch.set_num_threads(2)
    assert pacore_sched.main(ASK) == 0
    assert torch.get_num_threads() == 2


def test_usable_cpus_are_those_of_the_process(monkeypatch):
    """Guards containers and `taskset`: a machine's CPUs may be more than the process may use."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5, 6}, raising=False)
    assert terminal.usable_cpus() == 3
