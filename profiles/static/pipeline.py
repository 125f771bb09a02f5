"""How far a kernel's hot loops copy ahead, read from Triton's GPU dialect (TTGIR).

Assumptions about the text of Triton 3.6.0: `scf.for` and `scf.while` end with a brace at their own
indentation. A pipelined load is a `ttg.async_copy_global_to_local`, or for tensor copies a
`ttng.async_tma_copy_global_to_local`, into a `ttg.local_alloc` whose leading dimension counts the
buffers, directly or through a `ttg.memdesc_index`. `ttg.async_commit_group` ends a group of copies,
and `ttg.async_wait {num = N}` leaves the N newest groups pending. Any other form gives None.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from profiles.static.sass import SCALAR_BYTES
from profiles.static.sass_loop import Span, hot_loops

LOOP = re.compile(r"\s*(?:%\S+ = )?scf\.(?:for|while)\b")
PRODUCT = re.compile(r"\b(?:tt\.dot|tt\.dot_scaled|ttng\.warp_group_dot) ")
LOAD = re.compile(
    r"\b(?:tt\.load|ttg\.async_copy_global_to_local) .*: tensor<((?:\d+x)+)!tt\.ptr<(\w+)>"
)
SCALAR_LOAD = re.compile(r"\btt\.load [^:]*: !tt\.ptr<")
ANY_COPY = re.compile(r"\bttn?g\.async_\w*(?:global_to_local|gather)\b")
TENSOR_COPY = "ttng.async_tma_copy_global_to_local"
COPY = re.compile(
    rf"\b(?:ttg\.async_copy_global_to_local %[\w#]+, |{TENSOR_COPY} %[\w#]+\[[^]]*\] )(%[\w#]+)"
    r".* -> (?:!ttg\.memdesc)?<((?:\d+x)+)(\w+)"
)
WAIT = re.compile(r"\bttg\.async_wait .*\{num = (\d+)")
COMMIT = "ttg.async_commit_group"
BUFFERS = re.compile(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<((?:\d+x)+)")
PART = re.compile(r"ttg\.memdesc_index (%[\w#]+)\[")


@dataclass(frozen=True)
class Pipeline:
    """What one loop copies to shared memory ahead of use. A copy of one element is a scalar."""

    buffers: tuple[int, ...] | None  # per operand; empty if none is copied; None: unknown
    async_wait: int | None  # the fewest groups of copies that a wait leaves pending
    bytes_ahead: int | None  # in flight in one program while it computes
    scalar_copies: int  # such as page numbers: each takes a stage of the pipeline
    scalar_loads: int  # scalars that are not copied


@dataclass(frozen=True)
class _Copy:
    line: int
    alloc: int | None  # the line of the buffers; None if not found
    buffers: int
    size: int  # bytes
    scalar: bool
    tensor: bool  # a tensor copy, which async_wait does not cover


def pipelines(ttgir: str) -> list[Pipeline]:
    """The pipelines of a kernel's hot loops (`sass_loop.hot_loops`), in the order of the code."""
    lines = ttgir.splitlines()
    products = [index for index, line in enumerate(lines) if PRODUCT.search(line)]

    def loaded(loop: Span) -> int:
        loads = filter(None, map(LOAD.search, lines[slice(*loop)]))
        return sum(_bytes(shape, kind) for shape, kind in (load.groups() for load in loads))

    copies = list(_copies(lines))
    hot = hot_loops(list(_loops(lines)), products, loaded)
    return [_pipeline(lines, copies, loop) for loop in hot]


def _loops(lines: Sequence[str]) -> Iterator[Span]:
    opened: list[tuple[int, int]] = []
    for index, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if LOOP.match(line):
            opened.append((indent, index))
        elif opened and indent == opened[-1][0] and re.match(r"\s*\}(?! do \{)", line):
            yield opened.pop()[1], index


def _copies(lines: Sequence[str]) -> Iterator[_Copy]:
    for index, line in enumerate(lines):
        if match := COPY.search(line):
            target, shape, kind = match.groups()
            alloc = _alloc(lines, index, target)
            sizes = _sizes(shape)
            shapes = BUFFERS.search(lines[alloc]) if alloc is not None else None
            allocated = _sizes(shapes[1]) if shapes else []
            buffers = allocated[0] if len(allocated) > len(sizes) else 1
            scalar = prod(sizes) == 1
            yield _Copy(index, alloc, buffers, _bytes(shape, kind), scalar, TENSOR_COPY in line)
        elif ANY_COPY.search(line):
            yield _Copy(index, None, buffers=0, size=0, scalar=False, tensor=False)


def _alloc(lines: Sequence[str], before: int, name: str) -> int | None:
    """The line that allocates `name`, or the buffers of which it is a part.

    Separate regions may use the same name: the nearest definition above `before` is the right one.
    """
    for index in range(before - 1, -1, -1):
        if lines[index].lstrip().startswith(f"{name} = "):
            part = PART.search(lines[index])
            if part:
                return _alloc(lines, index, part[1])
            return index if BUFFERS.search(lines[index]) else None
    return None


def _pipeline(lines: Sequence[str], copies: Sequence[_Copy], loop: Span) -> Pipeline:
    first, last = loop
    text = lines[first : last + 1]
    inside = [copy for copy in copies if first < copy.line < last]
    scalar_copies = sum(copy.scalar for copy in inside)
    scalar_loads = sum(bool(SCALAR_LOAD.search(line)) for line in text)
    waits = [(at, int(wait[1])) for at, line in enumerate(text) if (wait := WAIT.search(line))]
    async_wait = min((left for _, left in waits), default=None)
    # With warp specialisation, other warps copy, in another loop than the one that computes.
    elsewhere = not inside and any("ttg.warp_specialize" in line for line in lines)
    if elsewhere or any(copy.alloc is None for copy in inside):
        return Pipeline(None, async_wait, None, scalar_copies, scalar_loads)
    buffers = tuple(copy.buffers for copy in inside if not copy.scalar)
    pending = [_pending(lines, inside, loop, first + at, left) for at, left in waits]
    ahead = min(pending, default=0) + _tensors_ahead(copies, inside, first) if inside else None
    return Pipeline(buffers, async_wait, ahead, scalar_copies, scalar_loads)


def _pending(
    lines: Sequence[str], copies: Sequence[_Copy], loop: Span, wait: int, left: int
) -> int:
    """Bytes of the `left` newest groups when an iteration reaches line `wait`."""
    groups, size = [], {copy.line: copy.size for copy in copies if not copy.tensor}
    group_size = 0
    for at in (*range(wait, loop[1]), *range(loop[0], wait)):
        group_size += size.get(at, 0)
        if COMMIT in lines[at]:
            groups.append(group_size)
            group_size = 0
    return sum((groups * left)[-left:]) if left else 0


def _tensors_ahead(copies: Sequence[_Copy], inside: Sequence[_Copy], first: int) -> int:
    """Bytes of pending tensor copies while computing: issued before the loop, less one in use."""
    return sum(
        copy.size * (sum(other.alloc == copy.alloc for other in copies if other.line < first) - 1)
        for copy in inside
        if copy.tensor
    )


def _sizes(shape: str) -> list[int]:
    return [int(size) for size in re.findall(r"\d+", shape)]


def _bytes(shape: str, kind: str) -> int:
    return prod(_sizes(shape)) * SCALAR_BYTES.get(kind, 1)
