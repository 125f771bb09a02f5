"""Tests of the free memory of a machine, on trees of files like those of Linux."""

import pytest
import torch

from model import memory
from model.memory import free_bytes

CPU = torch.device("cpu")
GB = 10**9


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes files below a fake /proc and /sys/fs/cgroup."""
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroup")

    def write_files(**files):
        for name, content in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(str(content) + "\n")

    write_files(**{"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable:  {64 * GB // 1000} kB"})
    return write_files


def group(folder, most, used, cache=0, v1=False):
    limit, usage = ("limit_in_bytes", "usage_in_bytes") if v1 else ("max", "current")
    total = "total_" if v1 else ""
    stat = f"anon 5\n{total}inactive_file {cache}\n{total}active_file {cache}"
    folder = f"cgroup/{'memory/' if v1 else ''}{folder}"
    return {
        f"{folder}memory.{limit}": most,
        f"{folder}memory.{usage}": used,
        f"{folder}memory.stat": stat,
    }


def test_without_control_groups(write):
    """Guards against kilobytes taken for bytes, and a need for cgroups."""
    assert free_bytes(CPU) == 64 * GB // 1000 * 1024


def test_a_containers_limit(write):
    """Guards against being killed in a container, where /proc/meminfo shows the whole machine: the
    limit less what is used, except page cache, which is dropped when memory is needed."""
    write(**{"proc/self/cgroup": "0::/"}, **group("", 8 * GB, 3 * GB, GB))
    assert free_bytes(CPU) == 7 * GB
    write(**group("", 8 * GB, 9 * GB))
    assert free_bytes(CPU) == 0
    write(**group("", "max", 9 * GB))
    assert free_bytes(CPU) > 60 * GB


def test_the_tightest_of_nested_groups(write):
    """Guards against reading one group of a batch job's several; those without a limit, such as
    the root, have no files."""
    write(**{"proc/self/cgroup": "0::/slurm/job_1/step_0"})
    write(**group("slurm/job_1/", 16 * GB, 4 * GB), **group("slurm/job_1/step_0/", "max", GB))
    assert free_bytes(CPU) == 12 * GB
    write(**group("slurm/", 20 * GB, 15 * GB))
    assert free_bytes(CPU) == 5 * GB


def test_version_1(write):
    """Guards the older hierarchy: other files, a line per controller, a huge number for no
    limit; and a path that the container does not see."""
    write(**{"proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory,hugetlb:/docker/a1\n0::/"})
    write(**group("", 8 * GB, 3 * GB, GB, v1=True))
    assert free_bytes(CPU) == 7 * GB
    write(**group("docker/a1/", 9223372036854771712, GB, v1=True))
    assert free_bytes(CPU) == 7 * GB
    write(**group("docker/a1/", 4 * GB, GB, v1=True))
    assert free_bytes(CPU) == 3 * GB


def test_this_machine():
    """Guards against files of another form than above: more than 1 MiB and less than 1 PiB."""
    assert 2**20 < free_bytes(CPU) < 2**50
