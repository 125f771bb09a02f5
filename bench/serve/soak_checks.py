"""What a soak has seen, and what must be true of it."""

from collections import Counter
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from bench.serve.connection.timeline import Timeline
from bench.serve.workloads import mix

MAX_GROWTH = 0.05  # of memory, from the second quarter of the run to the last


@dataclass
class Seen:
    """What a soak has seen."""

    kinds: list[str]
    timelines: dict[int, Timeline] = field(default_factory=dict)
    statuses: dict[int, int] = field(default_factory=dict)
    wrong_ids: list[int] = field(default_factory=list)  # answers with another request's id
    left: list[int] = field(default_factory=list)
    integrity: list[dict] = field(default_factory=list)  # the last is of the idle server
    differing: list[int] = field(default_factory=list)  # requests with another answer alone
    alone: int = 0  # requests that were sent alone
    health_ms: list[float] = field(default_factory=list)
    unhealthy: int = 0
    rss: list[int] = field(default_factory=list)  # bytes
    seconds: float = 0.0

    def of(self, *kinds: str) -> list[int]:
        return [number for number, kind in enumerate(self.kinds) if kind in kinds]

    @property
    def answered(self) -> list[int]:
        """The requests that must have an answer."""
        return [n for n, kind in enumerate(self.kinds) if kind not in (*mix.LEAVE, "malformed")]


def rows(seen: Seen) -> list[dict]:
    """What was checked: its target, what was measured, and a failure if they differ."""
    idle = seen.integrity[-1]
    used = idle["pages"] - idle["free_pages"]
    faults = [check["fault"] for check in seen.integrity if check["fault"]]
    lost = [n for n in seen.answered if _lost(seen, n)]
    ids = Counter(id for t in seen.timelines.values() for id in t.ids)
    doubled = sum(count > 1 for count in ids.values()) + len(seen.wrong_ids)
    malformed = seen.of("malformed")
    refused = sum(seen.statuses.get(n) == 400 for n in malformed)
    errors = [status for status in seen.statuses.values() if status >= 500]
    busy = idle["jobs"] + idle["groups"]
    health = _count("/health not 200", seen.unhealthy, f"of {len(seen.health_ms)}")
    if not seen.health_ms:
        health["failure"] = "/health was never asked"
    made = [
        _count("answers lost or failed", len(lost), _first(seen, lost)),
        _count("answers doubled or of another request", doubled),
        _count("answers unlike those alone", len(seen.differing), f"of {seen.alone}"),
        _count("malformed bodies without status 400", len(malformed) - refused),
        _count("statuses from 500", len(errors), f"such as {errors[0]}" if errors else ""),
        _count("requests left on the idle server", busy),
        _count("pages leaked", used, f"of {idle['pages']}"),
        _count("faults of the engine's state", len(faults), "; ".join(faults[:1]))
        | {"checks": len(seen.integrity)},
        health,
    ]
    if growth := _growth(seen.rss):
        made.append(growth)
    return [*made, *_figures(seen)]


def _figures(seen: Seen) -> list[dict]:
    """What was measured without a target."""
    p50, p99 = map(float, np.percentile(seen.health_ms or [0.0], (50, 99)))
    requests = len(seen.kinds) / seen.seconds
    tokens = sum(t.output for t in seen.timelines.values()) / seen.seconds
    return [
        {
            "impl": "/health p50, p99",
            "measured": f"{p50:.1f}, {p99:.1f} ms",
            "p50_ms": p50,
            "p99_ms": p99,
            "failure": None,
        },
        {
            "impl": "throughput",
            "measured": f"{requests:.1f} requests/s, {tokens:.1f} tokens/s",
            "requests_per_second": requests,
            "tokens_per_second": tokens,
            "left": len(seen.left),
            "failure": None,
        },
    ]


def _lost(seen: Seen, number: int) -> bool:
    done = seen.timelines.get(number)
    choices = mix.CHOICES.get(seen.kinds[number], 1)
    return done is None or bool(done.failure) or len(done.texts) != choices or not done.output


def _first(seen: Seen, lost: list[int]) -> str:
    if not lost:
        return f"of {len(seen.answered)}"
    done = seen.timelines.get(lost[0])
    return f"such as {lost[0]}: {(done and done.failure) or 'choices without tokens'}"


def _count(name: str, count: int, note: str = "") -> dict:
    """A check of something that may not happen."""
    measured = f"{count} {note}".strip()
    failure = f"{name}: {measured}" if count else None
    return {"impl": name, "target": "0", "measured": measured, "count": count, "failure": failure}


def _growth(rss: list[int]) -> dict | None:
    """The check of memory by quarters of the run; None where it was not probed."""
    if len(rss) < 8 or not all(rss):
        return None
    cuts = [len(rss) * quarter // 4 for quarter in range(5)]
    quarters = [median(rss[a:b]) / 2**20 for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    growth = quarters[3] / quarters[1] - 1
    texts = ", ".join(f"{mib:.0f}" for mib in quarters)
    return {
        "impl": "memory of the last quarter over the second's",
        "target": f"+{100 * MAX_GROWTH:.0f} %",
        "measured": f"{100 * growth:+.1f} % ({texts} MiB)",
        "rss_mib": quarters,
        "failure": None if growth <= MAX_GROWTH else f"memory grew by {100 * growth:.1f} %",
    }
