"""InputError, which commands print as one line without a traceback. Imports no torch."""

from pathlib import Path
from reprlib import Repr
from traceback import walk_tb

# Raised to end the program or a generator; whatever else is raised says that something failed.
STOPS = (KeyboardInterrupt, SystemExit, GeneratorExit)


class InputError(ValueError):
    """A mistake in the user's input: one line that says what is wrong and what would be right.

    Names from files may hold control characters, which begin a second line or command the
    terminal: they are written as escapes.
    """

    def __init__(self, text: str) -> None:
        super().__init__("".join(c if c.isprintable() else _escaped(c) for c in text))


class ContextError(InputError):
    """A prompt that does not fit into the model's context."""


def reason(error: BaseException) -> str:
    """What an error says, on one line. One that is no InputError is called unexpected, with its
    type and the line of code that raised it."""
    if isinstance(error, InputError):
        return str(error)
    words = " ".join(str(error).split())[:300]
    text = f"unexpected {type(error).__name__}" + (f": {words}" if words else "")
    if error.__traceback__:
        *_, (frame, line) = walk_tb(error.__traceback__)
        text += f" ({Path(frame.f_code.co_filename).name}, line {line})"
    return str(InputError(text))


def shown(value: object) -> str:
    """`value` for an error message: its repr, shortened to about a line."""
    return _SHORT.repr(value)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 3, 80, 40, 80
