"""A worker's tasks and the form that it blames for a failure; in this process, on small cases."""

import warnings

import pytest
import torch

from bench.measure import ops, timing
from bench.measure.poison import poisons
from model import cuda_graph
from profiles.runs import measuring as measuring_module
from profiles.runs.measuring import TaskRunner
from profiles.runs.pytest_tasks import collected, run_test
from profiles.runs.task import Task
from profiles.runs.task_lists import first_light, record
from profiles.runs.worker import answer_to

CPU = torch.device("cpu")
ILLEGAL = RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few repeats."""
    monkeypatch.setattr(timing, "MAX_REPEATS", timing.MIN_REPEATS)


@pytest.fixture(scope="module")
def measuring() -> TaskRunner:
    return TaskRunner("cpu")


def task(tasks: list[Task], section: str, text: str) -> Task:
    return next(t for t in tasks if t.section == section and text in str(t))


def broken(monkeypatch, form: str, error: Exception, calls: int = 0) -> None:
    """Make a form of every op raise after `calls` calls."""
    plain, left = ops.form, [calls]

    def form_of(op: str, name: str):
        def prepare(inputs: dict):
            call = plain(op, name)(inputs)

            def run():
                if name == form:
                    left[0] -= 1
                    if left[0] < 0:
                        raise error
                return call()

            return run

        return prepare

    monkeypatch.setattr(ops, "form", form_of)
    monkeypatch.setattr(ops, "sets_for", lambda *_: 1)  # checked, prepared, then timed


@pytest.mark.parametrize("task_list", [record, first_light])
@pytest.mark.parametrize(
    ("section", "text", "op"),
    [
        ("roofline", "", "roofline"),
        ("numerics", "rms_norm, T1 C97", "rms_norm"),
        ("ops", "rms_norm, T1 ", "rms_norm"),
        ("decode", "B4", "decode_step"),
        ("engine", "", "engine_step"),
        ("vision", "1920", "vision"),
    ],
)
def test_each_section(measuring, task_list, section: str, text: str, op: str):
    """Guards the path that a GPU takes with the 10B, here with `tiny`: every listed task can run,
    in exactly the forms that it names."""
    one = task(task_list(CPU), section, text)
    made = [row for row in measuring.carry_out(one) if row["op"] == op]
    assert [row.get("impl") for row in made] == list(one.forms or [None])
    assert all(row["failure"] is None for row in made)
    assert {row["case"] for row in made} == {one.case}
    if section not in ("roofline", "numerics"):
        assert all(row["median_us"] > 0 and row["roofline_pct"] > 0 for row in made)


@pytest.mark.parametrize(
    ("section", "text", "op"),
    [
        ("launches", "", "launch"),
        ("pairs", "rms_norm", "rms_norm"),
        ("pairs", "prefix_attention", "prefix_attention"),
        ("linears", "lm_head T16", "linear"),
        ("linears", "gate_up T64", "linear"),
    ],
)
def test_sections_for_decisions(measuring, section: str, text: str, op: str):
    """Guards the sections that only first-light has: a row for each form, under the task's names,
    or a second run would measure it again."""
    one = task(first_light(CPU), section, text)
    made = measuring.carry_out(one)
    assert [row["impl"] for row in made] == list(one.forms)
    assert {(row["op"], row["case"], row["dtype"]) for row in made} == {one.key}
    assert all(row["failure"] is None and row["median_us"] > 0 for row in made)
    assert one.op == op


def test_both_forms_of_a_switch_are_checked(measuring):
    """Guards the numerics of pairs: both values of a switch are checked, under the task's names,
    before anything is timed."""
    work = first_light(CPU)
    one = task(work, "numerics", "pdl=1")
    made = measuring.carry_out(one)
    assert [row["impl"] for row in made] == list(one.forms) == ["portable pdl=0", "portable pdl=1"]
    assert {(row["op"], row["case"], row["dtype"]) for row in made} == {one.key}
    assert all(row["failure"] is None and row["max_err"] < 0.1 for row in made)
    assert work.index(one) < work.index(task(work, "pairs", ""))


def test_decisions_come_before_the_op_table():
    """Guards the first minutes: the tasks that decisions depend on come before the rest of the op
    table, are cheap, and belong to no other command."""
    for device in (CPU, torch.device("cuda")):
        work = first_light(device)
        sections = [one.section for one in work]
        deciding = [one for one in work if one.section in ("launches", "pairs", "linears")]
        assert sections.index("roofline") < sections.index("launches") < sections.index("ops")
        assert sum(one.arguments["budget_s"] for one in deciding) < 10
        keys = [(one.section, one.key) for one in deciding]
        assert len(set(keys)) == len(keys)
        assert not {"launches", "pairs", "linears"} & {one.section for one in record(device)}


def test_a_decode_step_by_part(measuring):
    """Guards --no-breakdown, and the breakdown without it."""
    for breakdown in (False, True):
        one = task(record(CPU, breakdown=breakdown), "decode", "B1 ")
        parts = [row for row in measuring.carry_out(one) if row["op"] == "decode_part"]
        assert bool(parts) == breakdown


@pytest.mark.parametrize("calls", [0, 1, 3], ids=["checked", "prepared", "timed"])
def test_the_form_that_poisons_is_named(measuring, monkeypatch, calls: int):
    """Guards the other forms of a case: an illegal access during checks, preparation or timing ends
    the task and names the form that caused it."""
    broken(monkeypatch, "portable", ILLEGAL, calls)
    answer = answer_to(task(record(CPU), "ops", "rms_norm, T1 "), measuring.carry_out)
    assert answer["spoiled"] and answer["form"] == "portable" and answer["rows"] == []
    assert answer["failure"] == f"RuntimeError: {ILLEGAL}"


def test_an_error_that_poisons_nothing_costs_no_process(measuring, monkeypatch):
    """Guards against replacing a worker needlessly: a form that only raises gets a row, like the
    others, in the same process."""
    broken(monkeypatch, "portable", ValueError("out of range"), calls=3)
    answer = answer_to(task(record(CPU), "ops", "rms_norm, T1 "), measuring.carry_out)
    eager, portable = answer["rows"]
    assert not answer["spoiled"] and answer["failure"] is None
    assert portable["failure"] == "ValueError: out of range" and eager["median_us"] > 0
    assert "in run\n" in portable["trace"] and "trace" not in eager  # where it was raised


def test_a_failed_capture_spoils_the_process(measuring, monkeypatch):
    """Guards later tasks: the engine continues without graphs, and its row says so, but the process
    cannot capture any more."""
    assert not measuring.spoiled()
    monkeypatch.setattr(cuda_graph, "_failures", ["operation not permitted"])
    assert measuring.spoiled()


def test_wrong_forms_are_timed_on_demand(measuring, monkeypatch):
    """Guards --time-anyway: a form that exceeds its tolerance has a time and a failure, without the
    option only the failure; a form that cannot run never has a time."""
    monkeypatch.setattr(
        "bench.measure.verdicts.excess", lambda error, allowed: "max error 1 exceeds 0"
    )
    for anyway in (False, True):
        made = measuring.carry_out(task(record(CPU, anyway=anyway), "ops", "rms_norm, T1 "))
        assert [row["failure"] for row in made] == ["max error 1 exceeds 0"] * 2
        assert [row["median_us"] is not None for row in made] == [anyway] * 2
    broken(monkeypatch, "portable", ValueError("no"))
    eager, portable = measuring.carry_out(task(record(CPU, anyway=True), "ops", "rms_norm, T1 "))
    assert eager["median_us"] and portable["median_us"] is None
    assert portable["failure"] == "ValueError: no"


def test_the_probe_stops_at_a_wrong_result(measuring, monkeypatch):
    """Guards the minutes after it: if the first kernel is wrong, there are no tasks."""
    probe = Task("probe", "silu_mul", "probe", None, ("portable",))
    plans = {"first-light": lambda device, packed: []}
    monkeypatch.setattr(measuring_module.task_lists, "TASK_LISTS", plans)
    assert "tasks" in measuring.carry_out(probe)[-1]
    broken(monkeypatch, "portable", ValueError("no"))
    (row,) = measuring.carry_out(probe)
    assert row["failure"] == "ValueError: no"


def test_a_pack_that_does_not_fit_only_costs_time(measuring, monkeypatch, tmp_path):
    """Guards the minutes on a GPU: with a wrong or old pack, kernels are compiled there and a row
    says why; with a good pack they are not."""
    planned = []

    def first_light(device: torch.device, packed: bool) -> list[Task]:
        planned.append(packed)
        return []

    monkeypatch.setattr(measuring_module.task_lists, "TASK_LISTS", {"first-light": first_light})
    path = tmp_path / "kernels.tar"
    path.write_text("no pack")
    arguments = {"kernels": str(path)}
    probe = Task("probe", "silu_mul", "probe", None, ("portable",), arguments=arguments)
    assert "is not a file of `profiles kernels pack`" in measuring.carry_out(probe)[0]["failure"]
    for warning in ("old", None):

        def unpack(path: object, warning: str | None = warning) -> tuple[int, int]:
            if warning:
                warnings.warn(warning, stacklevel=1)
            return 3, 2

        monkeypatch.setattr(measuring_module, "unpack", unpack)
        row = measuring.carry_out(probe)[0]
        assert row["failure"] == warning and row["kernels"] == 3
    assert planned == [False, False, True]


def test_kernels_are_compiled_before_the_op_table():
    """Guards a GPU's timing stages, whose single worker would compile for minutes. Not needed with
    a pack or on a CPU."""
    gpu = torch.device("cuda")
    sections = [one.section for one in first_light(gpu)]
    assert sections.index("compile") < sections.index("ops")
    assert "compile" not in [one.section for one in first_light(gpu, packed=True)]
    assert "compile" not in [one.section for one in first_light(CPU)]


def test_what_poisons():
    """Guards both sides: errors of CUDA, Triton, cuBLAS, capture end a process; others do not."""
    for text in (
        str(ILLEGAL),
        "CUDA error: the launch timed out and was terminated",
        "Triton Error [CUDA]: an illegal memory access was encountered",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx",
        "operation not permitted when stream is capturing",
        "captures_underway.empty() INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp",
    ):
        assert poisons(text)
    for text in (
        "CUDA out of memory. Tried to allocate 20.00 GiB",
        "out of resource: shared memory, Required: 240000, Hardware limit: 232448",
        "max error 1.0e-2 exceeds 1.0e-3",
    ):
        assert not poisons(text)


def test_tests_as_tasks():
    """Guards tests as tasks: found by name, run one by one, with separate outcomes. An outdated
    list would silently omit them."""
    names = collected()
    for file in ("test_decode_graph", "test_cuda_graph", "test_timing", "test_sampling_triton"):
        assert any(file in name for name in names), file
    assert run_test(next(name for name in names if "timing" in name)).items() >= {
        ("failure", None),
        ("skipped", "Skipped: needs an NVIDIA GPU"),
    }


def test_a_failed_test_has_its_reason():
    """Guards the row of a test that fails or does not exist."""
    assert "no test" in run_test("tests/profiles/test_measuring.py::no_such_test")["failure"]


@pytest.mark.gpu
def test_gpu_environment():
    """Guards the record of the machine behind the rows."""
    found = measuring_module.environment(torch.device("cuda"))
    assert found["device"] == torch.cuda.get_device_name()
    assert found["driver"]
    assert found["state"]["clocks.max.sm"].endswith("MHz")
