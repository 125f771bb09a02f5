"""The names under which a model is served: its own, and with PaCoRe widths, `NAME:pacore-16`."""

import re
from collections.abc import Sequence

from pacore_sched.serve.errors import ApiError


class Names:
    """`names` are those of one model."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    @property
    def listed(self) -> list[str]:
        """The names of /v1/models; any widths may stand in the place of 16."""
        return [*self.names, *(f"{name}:pacore-16" for name in self.names)]

    def widths(self, model: str) -> list[int] | None:
        """The widths in a requested name, such as [32, 4] of `NAME:pacore-32-4`; None if it has
        none. Raises ApiError for a name that is not served."""
        if model in self.names:
            return None
        name, _, suffix = model.rpartition(":")
        if name in self.names and re.fullmatch(r"pacore-[1-9]\d{0,5}(-[1-9]\d{0,5}){0,15}", suffix):
            return [int(width) for width in suffix.split("-")[1:]]
        raise ApiError(
            404,
            f"there is no model {model!r:.200}; the server has {', '.join(self.listed)}",
            param="model",
            code="model_not_found",
        )
