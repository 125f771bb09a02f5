"""`python -m bench replicas STUDY`: what several replicas on Ray gain, survive and cost.

`scale`: two replicas on a core each against one, and against two processes without a coordinator.
`kill`: replicas and the driver killed while `batch` runs; nothing may be lost or doubled.
`replay`: the simulated cluster's error against replicas, with pinned lengths.
`overhead`: the coordinator's time per problem with up to 1,024 replicas that are played.
All run on this machine's CPU, with one thread per replica.
"""

import argparse
from collections.abc import Callable, Iterator

import torch

from bench.cli.measurement import Measurement
from bench.options import SECONDS
from bench.replicas import kill, overhead, replay, scale
from bench.replicas.engines import MODELS
from bench.rows import show
from model.errors import InputError
from model.terminal import integer

# The options of each study, with their defaults.
STUDIES: dict[str, dict[str, object]] = {
    "scale": {"model": "tiny", "problems": 8, "repeats": 5},
    "kill": {
        "model": "tiny",
        "problems": 200,
        "replicas": 2,
        "every": 20.0,
        "seed": 0,
        "migrate": True,
    },
    "replay": {"model": "tiny", "problems": 16, "repeats": 5, "migrate": True},
    "overhead": {"seed": 0, "migrate": True},
}
RUNS: dict[str, Callable[..., Iterator[dict]]] = {
    "scale": scale.run,
    "kill": kill.run,
    "replay": replay.run,
    "overhead": overhead.run,
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `replicas`; None is the study's default."""
    add = parser.add_argument
    add("study", choices=STUDIES, help="what to measure")
    add("--model", choices=MODELS, help="all but overhead; default: tiny")
    add("--problems", type=integer(1, 10**6), metavar="N", help=_defaults("problems"))
    add("--replicas", type=integer(1, 64), metavar="N", help=_defaults("replicas"))
    add("--every", type=SECONDS, metavar="SECONDS", help=f"between kills; {_defaults('every')}")
    add("--repeats", type=integer(1, 1000), metavar="N", help=_defaults("repeats"))
    add("--seed", type=integer(0, 2**63 - 1), help=_defaults("seed"))
    add(
        "--migrate",
        action=argparse.BooleanOptionalAction,
        help="move rollouts in the tail (replay and overhead: with and without); default: yes",
    )


def rows(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """The rows of the study. Raises InputError for options that are not the study's."""
    study = options.study
    defaults = STUDIES[study]
    if options.device == "cuda":
        raise InputError("--device cuda: these studies measure replicas on a CPU")
    if options.threads:
        raise InputError("--threads: every replica computes with one thread")
    names = dict.fromkeys(name for known in STUDIES.values() for name in known)
    given = {name: getattr(options, name) for name in names}
    for name, value in given.items():
        if value is not None and name not in defaults:
            having = [other for other, known in STUDIES.items() if name in known]
            raise InputError(f"--{name} is an option of {' and '.join(having)}, not of {study}")
    torch.set_num_threads(1)  # as rows say of the device
    chosen = {
        name: default if given[name] is None else given[name] for name, default in defaults.items()
    }
    yield from RUNS[study](**chosen)


def _defaults(name: str) -> str:
    values = [f"{known[name]:g} ({study})" for study, known in STUDIES.items() if name in known]
    return f"default: {', '.join(values)}"


REPLICAS = Measurement(rows, show.replicas, arguments)
