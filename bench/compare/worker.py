"""Worker script of `bench compare`: prepares a case once and times it on request.

Its argument is the folder of the checkout to time. The script is from the current checkout but the
timed code may be much older, so it uses only names that have long been public there: `cases`,
`check_case`, `form`, `measure`, `sets_for`, `device_name`. It reads requests as lines of JSON from
stdin, writes an answer to each to stdout, and exits when stdin ends.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path


class Worker:
    """Serves requests: the first constructs it, each later one names a method and arguments."""

    def __init__(self, device: str, dtype: str | None, threads: int) -> None:
        import torch

        from bench.cases import cases
        from bench.ops import MAIN_DTYPE

        torch.set_num_threads(threads)
        self.device = torch.device(device)
        self.dtype = getattr(torch, dtype) if dtype else MAIN_DTYPE[device]
        self.cases = {(case.op, case.name): case for case in cases(device)}
        self.calls: dict[str, list[Callable]] = {}

    def describe(self) -> dict:
        """The timed checkout, the device, the dtype and the cases."""
        from bench import rows

        return {
            "root": str(Path(rows.__file__).resolve().parents[1]),
            "device": rows.device_name(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),  # older code has no dtype_name
            "cases": list(self.cases),
        }

    def prepare(self, op: str, case_name: str, impls: Sequence[str]) -> dict:
        """Check a case's results and prepare its calls, which replace the previous case's.

        Returns the forms that can be timed, and why the others cannot.
        """
        from bench.numerics import form
        from bench.ops import check_case
        from bench.timing import sets_for

        self.calls = {}
        case = self.cases[op, case_name]
        rows = check_case(case, self.device, self.dtype, impls)
        unfit = {row["impl"]: row["failure"] or row.get("skipped") for row in rows}
        unfit = {impl: reason for impl, reason in unfit.items() if reason}
        sets = sets_for(case.bytes(self.dtype), self.device)
        inputs = [case.inputs(seed, self.device, self.dtype) for seed in range(sets)]
        for impl in [row["impl"] for row in rows if row["impl"] not in unfit]:
            self.calls[impl] = [form(op, impl)(input_set) for input_set in inputs]
        return {"forms": list(self.calls), "unfit": unfit}

    def time(self, forms: Sequence[str], budget_s: float) -> dict:
        """Median time of a call of each form, in microseconds."""
        from bench.timing import measure

        candidates = {name: partial(_call, self.calls[name]) for name in forms}
        sets = len(self.calls[forms[0]])
        timings = measure(candidates, device=self.device, sets=sets, budget_s=budget_s)
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
