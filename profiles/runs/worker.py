"""The worker process of supervisor.py: `python -m profiles.runs.worker DEVICE`.

An empty DEVICE means a GPU if there is one. The worker reads tasks as lines of JSON from stdin,
writes an answer to each to stdout, and ends when stdin does. What tasks print goes to stderr; so do
the stacks of a task that exceeds its limit. After a task that spoiled the process
(bench/measure/poison.py) the worker answers and ends.
"""

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TextIO

from bench.measure.poison import PoisonedError, poisons
from kernels.errors import one_line
from profiles.runs.task import Row, Task

SPOILED = 86  # exit code


def serve(carry_out: Callable[[Task], list[Row]], spoiled: Callable[[], bool] = bool) -> None:
    """Answer tasks until stdin ends. `spoiled` reports a damaged process that raised no error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    stacks = os.fdopen(os.dup(2), "w")  # pytest, in a task, redirects 2
    faulthandler.enable(stacks)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    answers.write("{}\n")  # ready
    for line in sys.stdin:
        answer = answer_to(Task.from_json(line), carry_out, stacks)
        answer["spoiled"] = answer["spoiled"] or spoiled()
        answers.write(json.dumps(answer) + "\n")
        if answer["spoiled"]:
            sys.stderr.flush()
            os._exit(SPOILED)


def answer_to(
    task: Task, carry_out: Callable[[Task], list[Row]], stacks: TextIO | None = None
) -> dict:
    """The task's rows, or its error. If it exceeds its limit, its stacks go to `stacks` (default:
    stderr)."""
    misses, start = count_misses(), time.monotonic()
    rows, failure, form, poisoned = [], None, None, False
    faulthandler.dump_traceback_later(task.limit_s, file=stacks or sys.stderr)
    try:
        rows = carry_out(task)
    except PoisonedError as error:
        failure, form, poisoned = str(error), error.form, True
    except BaseException as error:  # a task that exits must not end the others
        failure = one_line(error)
        traceback.print_exc()
    finally:
        faulthandler.cancel_dump_traceback_later()
    texts = [failure, *(row.get("failure") for row in rows)]
    return {
        "rows": rows,
        "failure": failure,
        "form": form,
        "seconds": time.monotonic() - start,
        "cache_misses": count_misses() - misses,
        "spoiled": poisoned or any(text and poisons(text) for text in texts),
    }


_misses = 0


def count_misses() -> int:
    """The number of kernels that Triton has compiled so far because its cache lacked them."""
    triton = sys.modules.get("triton")
    if triton is not None and triton.knobs.compilation.listener is None:

        def listen(*, cache_hit: bool, **_: object) -> None:
            global _misses
            _misses += not cache_hit

        triton.knobs.compilation.listener = listen
    return _misses


def _end_with_parent(parent: int) -> None:
    """End this process when its parent is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    from profiles.runs.measuring import TaskRunner  # imports torch

    runner = TaskRunner(sys.argv[1] or None)
    serve(runner.carry_out, runner.spoiled)


if __name__ == "__main__":
    main()
