"""The process that carries out tasks: `python -m profiles.runs.worker DEVICE`, for supervisor.py.

An empty DEVICE is a GPU if there is one.

Tasks come as lines of JSON on stdin, an answer to each goes to stdout, and it ends with its stdin.
What tasks print goes to stderr. A task that outlives its limit has its stacks written there. After
one that spoiled the process (bench/poison.py) it answers, and ends.
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

from bench.poison import PoisonedError, poisons
from kernels.errors import one_line
from profiles.runs.task import Row, Task

SPOILED = 86  # exit code


def serve(carry_out: Callable[[Task], list[Row]], spoiled: Callable[[], bool] = bool) -> None:
    """Answer tasks until stdin ends. `spoiled` tells what no error may say."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    stacks = os.fdopen(os.dup(2), "w")  # pytest, in a task, turns 2 elsewhere
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
    """The task's rows, or what it raised; if it outlives its limit, its stacks go to `stacks`
    (stderr if None)."""
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
    """Kernels that Triton had to compile so far, as its cache did not have them."""
    triton = sys.modules.get("triton")
    if triton is not None and triton.knobs.compilation.listener is None:

        def listen(*, cache_hit: bool, **_: object) -> None:
            global _misses
            _misses += not cache_hit

        triton.knobs.compilation.listener = listen
    return _misses


def _end_with_parent(parent: int) -> None:
    """End this process when whoever started it is gone, whatever it is at."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> None:
    from profiles.runs.measuring import Measuring  # imports torch

    measuring = Measuring(sys.argv[1] or None)
    serve(measuring.carry_out, measuring.spoiled)


if __name__ == "__main__":
    main()
