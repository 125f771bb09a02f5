"""The error class of unavailable implementations, and one-line error messages. Imports nothing."""


class ImplError(ValueError):
    """The requested implementation does not exist, or cannot run on this machine."""


def one_line(error: BaseException) -> str:
    """Type and first line of an error.

    Of Triton's CompilationError it is the last line: the reason, after the source.
    """
    lines = str(error).strip().splitlines() or [""]
    of_compiler = any(base.__name__ == "CompilationError" for base in type(error).__mro__)
    return f"{type(error).__name__}: {lines[-1 if of_compiler else 0]}"
