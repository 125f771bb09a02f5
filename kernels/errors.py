"""Error classes that commands print as one line, and one-line messages. Imports nothing."""


class ImplError(ValueError):
    """The requested implementation does not exist, or cannot run on this machine."""


class VariableError(ValueError):
    """An environment variable has a value that it may not have."""


def one_line(error: BaseException) -> str:
    """Type and first line of an error.

    Of Triton's CompilationError it is the last line: the reason, after the source.
    """
    lines = str(error).strip().splitlines() or [""]
    of_compiler = any(base.__name__ == "CompilationError" for base in type(error).__mro__)
    return f"{type(error).__name__}: {lines[-1 if of_compiler else 0]}"
