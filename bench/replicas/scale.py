"""Two replicas against one: `python -m bench replicas scale`.

Every replica computes with one thread on a core of its own. How much two cores can give at all is
measured by two plain processes that have an engine each and know nothing of the other: they share
the memory bandwidth, too. All rollouts have the same length, so that there is no tail in which a
replica is idle. The forms alternate; starting Ray and loading the model are not part of the times.
"""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median

import torch

from bench.measure.origin import origin
from bench.replicas.engines import MAX_RUNNING, Build
from bench.replicas.runs import Run, fault, folders, plain_processes, run_replicas, started
from model.errors import InputError
from model.terminal import progress, usable_cpus

WIDTH = MAX_RUNNING // 2  # rollouts of a problem
TOKENS = 96  # of a rollout
ONE_P, TWO_P, ONE, TWO = "1 process", "2 processes", "1 replica", "2 replicas"
BASES = {ONE_P: ONE_P, TWO_P: ONE_P, ONE: ONE, TWO: ONE}  # a form -> what its gain refers to
PLAIN = {ONE_P: ONE_P, TWO_P: TWO_P, ONE: ONE_P, TWO: TWO_P}  # -> the same without Ray


def conversations(count: int) -> dict[int, list[dict]]:
    """Problems, by number."""
    text = "What is {} times {}? Explain every step."
    return {n: [{"role": "user", "content": text.format(n, n + 3)}] for n in range(count)}


def run(model: str, problems: int, repeats: int) -> Iterator[dict]:
    """A row per form."""
    if usable_cpus() < 2:
        raise InputError("scale needs two cores, and this process may use only one")
    if problems % 2:
        raise InputError(f"--problems {problems}: scale needs an even number, half for each")
    work = conversations(problems)
    runs: dict[str, list[Run]] = {form: [] for form in BASES}
    with folders("cores", "cores") as (of_processes, of_replicas):
        plain = Build(model, WIDTH, TOKENS, of_processes, {})
        build = Build(model, WIDTH, TOKENS, of_replicas, {})
        with plain_processes(plain, 2) as processes, started(build, 2) as replicas:
            with progress("scale", (repeats + 1) * len(BASES)) as advance:
                for repeat in range(repeats + 1):  # the first one warms up, and does not count
                    forms = list(BASES) if repeat % 2 else list(BASES)[::-1]
                    for form in forms:
                        count = int(form[0])
                        if form in (ONE_P, TWO_P):
                            done = processes.run(work, count)
                        else:
                            done = run_replicas(replicas.actors, work, count)
                        if repeat:
                            runs[form].append(done)
                        advance(1)
            case = f"{model} {problems} x [{WIDTH}] T{TOKENS}"
            start = {"ray_s": replicas.ray_s, "load_s": replicas.load_s}
            yield from rows(case, runs, problems * WIDTH * TOKENS, start)


def rows(
    case: str, runs: Mapping[str, Sequence[Run]], tokens: int, start: Mapping[str, float]
) -> list[dict]:
    """A row per form, from its runs; entry i of every form belongs to one repeat.

    tokens: that every run must generate
    """
    made = []
    for form, done in runs.items():
        gains = _gains(runs[BASES[form]], done)
        made.append(
            {
                "op": "replica_scale",
                "case": case,
                "impl": form,
                "dtype": "float32",
                "makespan_s": median(run.seconds for run in done),
                "tokens_per_second": median(run.tokens / run.seconds for run in done),
                "gain": median(gains),
                "gain_min": min(gains),
                "gain_max": max(gains),
                "over_plain": median(_gains(runs[PLAIN[form]], done)),
                "repeats": len(done),
                **(start if form in (ONE, TWO) else {}),
                "failure": fault(done, tokens),
                **origin(torch.device("cpu")),
            }
        )
    return made


def _gains(bases: Sequence[Run], runs: Sequence[Run]) -> list[float]:
    """How many times as fast each run is as its base."""
    return [base.seconds / run.seconds for base, run in zip(bases, runs, strict=True)]
