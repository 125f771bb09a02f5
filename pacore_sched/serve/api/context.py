"""What the handlers of requests need of the server."""

from dataclasses import dataclass, field

from pacore_sched.serve.api.names import Names
from pacore_sched.serve.images import MediaRules
from pacore_sched.serve.saved import SavedProblems
from pacore_sched.serve.service import Service


@dataclass(frozen=True)
class Context:
    """One server. `saved` keeps the finished rollouts of PaCoRe problems that were cut short."""

    service: Service
    names: Names
    media: MediaRules = field(default_factory=MediaRules)
    saved: SavedProblems | None = None
