"""Worker script of `bench compare`: prepares a case once and times it on request.

Its argument is the folder of the checkout to time. The script is from the current checkout but the
timed code may be much older, so it uses only names that have long been public there: see PLACES.
It reads requests as lines of JSON from stdin, writes an answer to each to stdout, and exits when
stdin ends.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

# The module of each name, and where it was before bench/ was divided into packages.
PLACES = {
    "cases": ("bench.suite", "bench.cases"),
    "form": ("bench.suite.forms", "bench.numerics"),
    "check_case": ("bench.measure.ops", "bench.ops"),
    "MAIN_DTYPE": ("bench.measure.devices", "bench.ops"),
    "device_name": ("bench.measure.origin", "bench.rows"),
    "measure": ("bench.measure.timing", "bench.timing"),
    "sets_for": ("bench.measure.timing", "bench.timing"),
}


def timed(name: str) -> Any:  # noqa: ANN401
    """The checkout's function or value of this name."""
    today, before = PLACES[name]
    try:
        module = import_module(today)
    except ModuleNotFoundError as error:
        if not f"{today}.".startswith(f"{error.name}."):  # something that it imports is missing
            raise
        module = import_module(before)
    return getattr(module, name)


class Worker:
    """Serves requests: the first constructs it, each later one names a method and arguments."""

    def __init__(self, device: str, dtype: str | None, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.device = torch.device(device)
        self.dtype = getattr(torch, dtype) if dtype else timed("MAIN_DTYPE")[device]
        self.cases = {(case.op, case.name): case for case in timed("cases")(device)}
        self.calls: dict[str, list[Callable]] = {}

    def describe(self) -> dict:
        """The timed checkout, the device, the dtype and the cases."""
        import bench

        return {
            "root": str(Path(bench.__file__).resolve().parents[1]),
            "device": timed("device_name")(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),  # older code has no dtype_name
            "cases": list(self.cases),
        }

    def prepare(self, op: str, case_name: str, impls: Sequence[str]) -> dict:
        """Check a case's results and prepare its calls, which replace the previous case's.

        Returns the forms that can be timed, and why the others cannot.
        """
        self.calls = {}
        case = self.cases[op, case_name]
        rows = timed("check_case")(case, self.device, self.dtype, impls)
        unfit = {row["impl"]: row["failure"] or row.get("skipped") for row in rows}
        unfit = {impl: reason for impl, reason in unfit.items() if reason}
        sets = timed("sets_for")(case.bytes(self.dtype), self.device)
        inputs = [case.inputs(seed, self.device, self.dtype) for seed in range(sets)]
        for impl in [row["impl"] for row in rows if row["impl"] not in unfit]:
            self.calls[impl] = [timed("form")(op, impl)(input_set) for input_set in inputs]
        return {"forms": list(self.calls), "unfit": unfit}

    def time(self, forms: Sequence[str], budget_s: float) -> dict:
        """Median time of a call of each form, in microseconds."""
        candidates = {name: partial(_call, self.calls[name]) for name in forms}
        sets = len(self.calls[forms[0]])
        timings = timed("measure")(candidates, device=self.device, sets=sets, budget_s=budget_s)
        for timing in timings.values():
            if slowed := getattr(timing, "slowed", None):  # older code does not look at clocks
                raise RuntimeError(slowed)
        return {name: timing.median_us for name, timing in timings.items()}


def _call(calls: Sequence[Callable], index: int) -> object:
    return calls[index]()


def main() -> None:
    """Serve until stdin ends. Output of the timed code goes to stderr."""
    sys.path[0] = sys.argv[1]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker: Worker | None = None
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            if worker is None:
                worker = Worker(*arguments)
                answer = worker.describe()
            else:
                answer = getattr(worker, name)(*arguments)
        except Exception as error:  # one case must not end the others
            first = str(error).strip().splitlines()[:1]
            answer = {"error": f"{type(error).__name__}: {''.join(first)}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
