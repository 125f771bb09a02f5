"""Which replica a request runs on: one that has the prompt's prefix, unless it has too much to do.

Among the replicas that have had the longest known prefix, the least loaded one is taken, if it has
at most SLACK + RATIO times the rollouts of the least loaded replica of all; otherwise, and for
prompts that are mostly unknown, the least loaded replica of all.
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence

from pacore_sched.replicas.serve.prompt_keys import PromptKeys

SLACK = 16  # rollouts: one PaCoRe round of the default width
RATIO = 2
MIN_SHARE = 0.1  # of a prompt; as of Ray Serve's PrefixCacheAffinityRouter
MAX_PREFIXES = 100_000  # that are remembered


class Affinity:
    """Chooses replicas, and knows how many rollouts each has. For use from one thread."""

    def __init__(self, max_prefixes: int = MAX_PREFIXES) -> None:
        self.load: Counter[str] = Counter()  # rollouts by replica
        self._max_prefixes = max_prefixes
        self._seen: OrderedDict[bytes, set[str]] = OrderedDict()  # prefix -> replicas; LRU

    def choose(self, prompt: PromptKeys, replicas: Sequence[str]) -> str:
        """The replica for a request, of at least one. `release` it when the request has ended."""
        least = min(replicas, key=self._order)
        chosen = min(self._with_prefix(prompt, replicas), key=self._order, default=least)
        if self.load[chosen] > SLACK + RATIO * self.load[least]:
            chosen = least
        self.load[chosen] += prompt.rollouts
        for key in prompt.keys:
            self._seen.setdefault(key, set()).add(chosen)
            self._seen.move_to_end(key)
        while len(self._seen) > self._max_prefixes:
            self._seen.popitem(last=False)
        return chosen

    def release(self, replica: str, prompt: PromptKeys) -> None:
        self.load[replica] -= prompt.rollouts
        if not self.load[replica]:
            del self.load[replica]  # it may have ended

    def _order(self, replica: str) -> tuple[int, str]:
        return self.load[replica], replica

    def _with_prefix(self, prompt: PromptKeys, replicas: Sequence[str]) -> list[str]:
        """The replicas that have had the longest known prefix, if it is worth anything."""
        for key, size in zip(reversed(prompt.keys), reversed(prompt.sizes), strict=True):
            if size < MIN_SHARE * prompt.sizes[-1]:
                break
            if known := [name for name in replicas if name in self._seen.get(key, ())]:
                return known
        return []
