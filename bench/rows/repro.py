"""The command that reproduces one row."""

import shlex
from collections.abc import Sequence


def command(
    op: str, case: str, impl: str, dtype: str, kind: str = "ops", options: Sequence[str] = ()
) -> str:
    """Such as "python -m bench ops --op rms_norm --shape 'T16 C4096' --impl eager portable ...".

    kind: "ops", or "numerics" for a row without times. A timed form runs together with the eager
    one, which its speed-up refers to. `options`: what else the case and the form need, such as
    --shapes and --with.
    """
    impls = ("eager", impl) if kind == "ops" and impl != "eager" else (impl,)
    arguments = ("--op", op, "--shape", case, "--impl", *impls, "--dtype", dtype)
    return shlex.join(["python", "-m", "bench", kind, *arguments, *options])
