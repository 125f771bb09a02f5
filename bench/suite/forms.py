"""Forms of an op: implementations, their modes and config values, peers, a user's own."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain

import torch

from bench.peers.peer import Library, Peer, Prepare
from bench.suite import OPS, PEERS
from bench.suite.op import Case
from kernels.runtime.configs import KernelConfig, use_config
from kernels.runtime.dispatch import IMPLS
from model.errors import InputError

NAMES = tuple(dict.fromkeys(name for peers in PEERS.values() for name in peers))
FORMS = (*IMPLS, "triton-invariant", "triton-separate", "triton-fused", *NAMES)


def form(op: str, name: str) -> Prepare:
    """A form of `op`, an implementation or a peer, as a function from inputs to the call.

    "triton-invariant" is the Triton form in its batch-invariant mode, "triton-separate" two ops
    where the fastest form is one, "triton-fused" one where the rule may choose two. "triton tma=1"
    is the Triton form with that config value instead of the rule's; there may be several.
    """
    if name in PEERS.get(op, {}):
        return PEERS[op][name]
    name, _, config_text = name.partition(" ")
    impl, _, mode = name.partition("-")
    modes = {
        "invariant": {"batch_invariant": True},
        "separate": {"fused": False},
        "fused": {"fused": True},
    }

    def prepare(inputs: dict) -> Callable[[], object]:
        return partial(OPS[op].run, **inputs, impl=impl, **modes.get(mode, {}))

    return _with_config(prepare, op, config_text) if config_text else prepare


def _with_config(prepare: Prepare, op: str, config_text: str) -> Prepare:
    """The calls of `prepare` with config values such as "tma=1 grain=64", which override those of
    `op` and of the op that it is built on."""
    config = parse_config(config_text)

    def prepared(inputs: dict) -> Callable[[], object]:
        call = prepare(inputs)

        def run() -> object:
            with use_config(op, **config), use_config(OPS[op].tuned_part or op, **config):
                return call()

        return run

    return prepared


def parse_config(text: str) -> KernelConfig:
    """The config values in a form's name, such as "tma=1 grain=64"."""
    pairs = (pair.partition("=") for pair in text.split())
    return {name: int(value) for name, _, value in pairs}


def select(
    cases: Iterable[Case], ops: Sequence[str] = (), shape: str = "", impls: Sequence[str] = ()
) -> list[Case]:
    """The cases of `ops` (all if empty) named `shape`, or else all with `shape` in their names,
    that have one of `impls` (any if empty).

    Raises InputError for an unknown op or form, listing the known ones, and if no case is left.
    """
    _check_known("op", ops, OPS)
    _check_known("form", impls, dict.fromkeys((*FORMS, *chain(*PEERS.values()))))
    of_ops = [case for case in cases if not ops or case.op in ops]
    matching = [case for case in of_ops if case.name == shape]
    matching = matching or [case for case in of_ops if shape in case.name]
    if not matching:
        names = ", ".join(repr(case.name) for case in of_ops)
        raise InputError(f"no case has {shape!r} in its name; choose one of {names}")
    with_form = [case for case in matching if not impls or forms_of(case, impls)]
    if not with_form:
        raise InputError(f"none of these cases has a form {' or '.join(map(repr, impls))}")
    return with_form


def add_form(op: str, name: str, prepare: Prepare, source: str = "added") -> None:
    """Add an implementation of `op` to the op table of this process: checked and timed like a peer.

    `prepare` takes the op's arguments as a dict and returns the call to time. Cases built after
    this include the form, on CPUs too. Adding a name again replaces its form. `source` says where
    it comes from, in the rows' `version`. Raises InputError for an unknown op and for the name of a
    built-in form.
    """
    _check_known("op", (op,), OPS)
    if name in FORMS:
        raise InputError(f"form {name!r} is built in: choose a name other than {', '.join(FORMS)}")
    library = Library("your own", source, lambda: source)
    PEERS[op][name] = Peer(name, op, prepare, library, on_cpu=True)


def forms_of(case: Case, names: Sequence[str]) -> tuple[str, ...]:
    """Those of `names` that the case's op has as a form, mode or peer, or as a form with config
    values."""
    ours = (*IMPLS, *case.modes)
    others = (*case.peers, *PEERS.get(case.op, ()))
    return tuple(name for name in names if name in others or name.partition(" ")[0] in ours)


def forms_here(case: Case, device: torch.device) -> tuple[str, ...]:
    """The forms and peers of a case that are timed by default."""
    return (*own_forms(case, device), *case.peers)


def _check_known(what: str, names: Sequence[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise InputError(f"unknown {what} {name!r}; choose one of {', '.join(known)}")


def own_forms(case: Case, device: torch.device) -> tuple[str, ...]:
    """The op's forms; on a CPU only two: Triton's interpreter is for tests, its bf16 is wrong."""
    return (*IMPLS, *case.modes) if device.type == "cuda" else IMPLS[:2]


def version(op: str, name: str) -> str | None:
    """The library of an op's peer, as in "xformers 0.0.35"; None for our own forms."""
    peer = PEERS.get(op, {}).get(name)
    return peer.library.version() if peer else None
