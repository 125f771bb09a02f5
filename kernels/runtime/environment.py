"""The environment variables of this project, and their values."""

import os

from kernels.errors import VariableError

# The first value is the default.
VARIABLES = {
    "PACORE_SPANS": ("off", "nvtx", "torch"),
    "PACORE_CHECK_SCHEDULE": ("0", "1"),
    "PACORE_WARM_UP": ("1", "0"),
    "PACORE_ONEDNN": ("auto", "0", "1"),
}


def variable(name: str) -> str:
    """The value of a variable; its default if it is empty or not set.

    Raises VariableError for a value that it cannot have.
    """
    value = os.environ.get(name) or VARIABLES[name][0]
    if value not in VARIABLES[name]:
        *others, last = VARIABLES[name]
        raise VariableError(f"{name} must be {', '.join(others)} or {last}, not {ascii(value)}")
    return value


def check_variables() -> None:
    """Raise VariableError for the first variable with a value that it cannot have."""
    for name in VARIABLES:
        variable(name)
