"""The prefix trees that attention is measured on, by name: shapes only, no tensors."""

from collections.abc import Iterator

from bench.inputs.trees import Node, fork
from pacore_sched.sched.scheduler import TOKEN_BUDGET

Forest = tuple[Node, ...]

BATCHES = (16, 32, 64)
PREFIXES = (512, 1024, 2048, 4096, 8192, 32768)
SUFFIXES = (128, 512, 2048, 8192, 32768)
# The most informative points of the grid: early and late in a round of rollouts, and the smallest
# and largest benefit of sharing.
MAIN_POINTS = (
    (16, 2048, 128),
    (16, 2048, 512),
    (32, 4096, 512),
    (64, 8192, 1024),
    (64, 512, 128),
    (64, 2048, 8192),
    (16, 32768, 2048),
)
# Halfway through a PaCoRe round over a photo of nine views, with rollouts of 12,000 tokens.
PACORE = {"low": (4, 1024, 6000), "medium": (16, 1024, 6000), "high": (32, 1024, 6000)}
LONG = (131072, 262144)  # tokens of a context
# For a CPU, whose heat map must take seconds.
CPU_GRID = [(16, prefix, suffix) for prefix in (128, 512, 2048) for suffix in (16, 64, 256)]


def rollouts(batch: int, prefix: int, suffix: int) -> tuple[str, Forest]:
    """A decode step of `batch` rollouts that share one prefix, named like "B16 P2048 S128"."""
    return f"B{batch} P{prefix} S{suffix}", (fork(prefix, [suffix] * batch),)


def main_forests() -> Iterator[tuple[str, Forest]]:
    """Decode steps, most informative first: points of the grid, PaCoRe rounds, groups, ragged and
    deep trees."""
    for point in MAIN_POINTS:
        yield rollouts(*point)
    for effort, point in PACORE.items():
        name, forest = rollouts(*point)
        yield f"pacore {effort} {name}", forest
    yield "4 x (B16 P2048 S512)", (fork(2048, [512] * 16),) * 4
    yield "4 x (B16 P8192 S2048)", (fork(8192, [2048] * 16),) * 4
    yield "ragged B32 P2048 S64..1056", (fork(2048, range(64, 1088, 32)),)
    yield "ragged B16 P4096 S1..16000", (fork(4096, [1 + 1067 * i - i % 7 for i in range(16)]),)
    yield "two levels P2048 4 x (1024 + 8 x 256)", (_two_levels(2048, 4, 1024, 8, 256),)
    yield "two levels P512 16 x (512 + 4 x 2048)", (_two_levels(512, 16, 512, 4, 2048),)
    yield "10 x (4000 + 400)", (fork(4000, [400] * 10),)
    yield "256 x (256 + 32)", (fork(256, [32] * 256),)
    yield "1024 x (2048 + 32)", (fork(2048, [32] * 1024),)


def long_contexts() -> Iterator[tuple[str, Forest]]:
    """Contexts of LONG tokens: rollouts that share one, a rollout alone in one, and the last chunk
    of a prompt."""
    for tokens in LONG:
        yield rollouts(16, tokens, 512)
        yield rollouts(1, tokens, 512)
        before = tokens - TOKEN_BUDGET
        yield f"prefill {TOKEN_BUDGET} behind {before}", (Node(tokens, new=TOKEN_BUDGET),)


def grid() -> Iterator[tuple[str, Forest]]:
    """The grid of batches, prefixes and suffixes without MAIN_POINTS, largest last."""
    points = [(b, p, s) for b in BATCHES for p in PREFIXES for s in SUFFIXES]
    for point in sorted(points, key=lambda point: point[1] + point[0] * point[2]):
        if point not in MAIN_POINTS:
            yield rollouts(*point)


def _two_levels(prefix: int, forks: int, middle: int, leaves: int, suffix: int) -> Node:
    return Node(prefix, children=tuple(fork(middle, [suffix] * leaves) for _ in range(forks)))
