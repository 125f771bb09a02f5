"""One-line descriptions of exceptions: kernels.errors.one_line."""

import pytest

from kernels.errors import one_line


class CompilationError(Exception):
    """Like Triton's, whose message has the source before the reason."""


class Unsupported(CompilationError):
    """A subclass, as Triton has them."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "ValueError: one"),
        (ValueError(), "ValueError: "),
        (ValueError("\n"), "ValueError: "),
        (CompilationError("at 3:5:\n    x = y\n    ^\ny is not defined"), "y is not defined"),
        (Unsupported("at 3:5:\n    x = y\nno lambdas"), "Unsupported: no lambdas"),
    ],
    ids=["first line", "nothing", "blank", "Triton's compiler", "a subclass"],
)
def test_one_line(error: Exception, line: str):
    """Guards the reason in a results row: Triton's compiler errors begin with "at 3:5:"."""
    assert one_line(error).endswith(line) and "\n" not in one_line(error)
    assert one_line(error).startswith(f"{type(error).__name__}: ")
