"""InputError, which commands print as one line without a traceback. Imports nothing."""


class InputError(ValueError):
    """A mistake in the user's input: one line that says what is wrong and what would be right."""
