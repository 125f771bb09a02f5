"""Errors that callers of ops tell apart. Imports nothing, so that a command can name them early."""


class ImplError(ValueError):
    """The implementation asked for does not exist, or this machine cannot run it."""
