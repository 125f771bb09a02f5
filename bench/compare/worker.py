"""One side of `bench compare`: prepares a case once and times it whenever it is its turn.

A script, run with the folder of the checkout that it is to time. The script is this checkout's, the
code that it times may be much older, so it keeps to what has long been public there: `cases`,
`check_case`, `form`, `measure`, `sets_for`, `device_name`. Requests come as lines of JSON on stdin,
an answer to each goes to stdout, and it ends with its stdin.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path


class Worker:
    """Answers requests: each method below is one, with its arguments, and returns JSON."""

    def __init__(self, device: str, dtype: str | None, threads: int) -> None:
        import torch

        from bench.cases import cases
        from bench.ops import MAIN_DTYPE

        torch.set_num_threads(threads)
        self.device = torch.device(device)
        self.dtype = getattr(torch, dtype) if dtype else MAIN_DTYPE[device]
        self.cases = {(case.op, case.name): case for case in cases(device)}
        self.calls: dict[str, list[Callable]] = {}

    def listed(self) -> dict:
        """Which code is timed, on what, and its cases."""
        from bench import rows

        return {
            "root": str(Path(rows.__file__).resolve().parents[1]),
            "device": rows.device_name(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),  # older code has no dtype_name
            "cases": list(self.cases),
        }

    def prepare(self, op: str, case: str, impls: Sequence[str]) -> dict:
        """Check a case's numbers and make its calls; drops those of the last one.

        Returns the forms that can be timed, and why the others cannot.
        """
        from bench.numerics import form
        from bench.ops import check_case
        from bench.timing import sets_for

        self.calls = {}
        found = self.cases[op, case]
        rows = check_case(found, self.device, self.dtype, impls)
        unfit = {row["impl"]: row["failure"] or row.get("skipped") for row in rows}
        unfit = {impl: why for impl, why in unfit.items() if why}
        sets = sets_for(found.bytes(self.dtype), self.device)
        inputs = [found.inputs(seed, self.device, self.dtype) for seed in range(sets)]
        for impl in [row["impl"] for row in rows if row["impl"] not in unfit]:
            self.calls[impl] = [form(op, impl)(one) for one in inputs]
        return {"forms": list(self.calls), "unfit": unfit}

    def time(self, forms: Sequence[str], budget_s: float) -> dict:
        """Median microseconds of a call of each form."""
        from bench.timing import measure

        candidates = {name: partial(_call, self.calls[name]) for name in forms}
        sets = len(self.calls[forms[0]])
        found = measure(candidates, device=self.device, sets=sets, budget_s=budget_s)
        return {name: timing.median_us for name, timing in found.items()}


def _call(of_sets: Sequence[Callable], index: int) -> object:
    return of_sets[index]()


def main() -> None:
    """Serve until stdin ends. What the timed code prints goes to stderr."""
    sys.path[0] = sys.argv[1]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker: Worker | None = None
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            if worker is None:
                worker = Worker(*arguments)
                answer = worker.listed()
            else:
                answer = getattr(worker, name)(*arguments)
        except Exception as error:  # one case must not end the others
            first = str(error).strip().splitlines()[:1]
            answer = {"error": f"{type(error).__name__}: {''.join(first)}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
