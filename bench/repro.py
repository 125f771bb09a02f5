"""The command that makes one row again."""

import shlex


def command(op: str, case: str, impl: str, dtype: str, kind: str = "ops") -> str:
    """As in "python -m bench ops --op rms_norm --shape 'T16 C4096' --impl eager portable ...".

    kind: "ops", or "numerics" for a row without times. A timed form gets the eager one beside it,
    which its speed-up is against.
    """
    impls = ("eager", impl) if kind == "ops" and impl != "eager" else (impl,)
    given = ("--op", op, "--shape", case, "--impl", *impls, "--dtype", dtype)
    return shlex.join(["python", "-m", "bench", kind, *given])
