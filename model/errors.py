"""InputError, which commands print as one line without a traceback. Imports no torch."""

from reprlib import Repr


class InputError(ValueError):
    """A mistake in the user's input: one line that says what is wrong and what would be right.

    Names from files may hold control characters, which begin a second line or command the
    terminal: they are written as escapes.
    """

    def __init__(self, text: str) -> None:
        super().__init__("".join(c if c.isprintable() else _escaped(c) for c in text))


def shown(value: object) -> str:
    """`value` for an error message: its repr, shortened to about a line."""
    return _SHORT.repr(value)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 3, 80, 40, 80
