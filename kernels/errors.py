"""Errors that callers of ops tell apart, and what to say of any. Imports nothing."""


class ImplError(ValueError):
    """The implementation asked for does not exist, or this machine cannot run it."""


def one_line(error: BaseException) -> str:
    """Type and first line of an error; of Triton's CompilationError, which shows the source first,
    the last line: the reason."""
    lines = str(error).strip().splitlines() or [""]
    of_compiler = any(kind.__name__ == "CompilationError" for kind in type(error).__mro__)
    return f"{type(error).__name__}: {lines[-1 if of_compiler else 0]}"
