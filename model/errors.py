"""Errors that commands tell their user in one line, without a traceback. Imports nothing."""


class InputError(ValueError):
    """A mistake in what the user gave: one line that names it and says what would be right."""
