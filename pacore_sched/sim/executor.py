"""The simulator's executor: advances a clock by the time that steps and images would take."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.request import Batch, Group, SampledTokens, Segment
from pacore_sched.sim.cost_model import CostModel, StepShape
from pacore_sched.sim.vision.encoder import SimEncoder
from pacore_sched.sim.workload import Photo


@dataclass
class Usage:
    """The work of one GPU. The first arrays have an entry per event: from `starts[i]` to `ends[i]`,
    `running[i]` rollouts decoded and a share `kv[i]` of all pages was in use. The others have one
    for each event with decode: `gaps[i]` tokens followed the rollout's last one after `gap_s[i]`
    seconds (a mean over the event's steps), or after `alone_s[i]` but for the vision tower."""

    starts: array = field(default_factory=lambda: array("d"))
    ends: array = field(default_factory=lambda: array("d"))
    running: array = field(default_factory=lambda: array("d"))
    kv: array = field(default_factory=lambda: array("d"))
    gaps: array = field(default_factory=lambda: array("d"))
    gap_s: array = field(default_factory=lambda: array("d"))
    alone_s: array = field(default_factory=lambda: array("d"))
    bytes: int = 0
    bytes_saved: int = 0  # by reading every node once instead of once per sequence
    flops: int = 0
    steps: int = 0
    prefill_s: float = 0.0  # that prompts and resumed rollouts added to steps
    tower_s: float = 0.0  # that the vision tower added to steps, or ran alone

    def add(self, start: float, end: float, running: int, kv: float) -> None:
        self.starts.append(start)
        self.ends.append(end)
        self.running.append(running)
        self.kv.append(kv)

    def add_gaps(self, gaps: int, gap_s: float, alone_s: float) -> None:
        self.gaps.append(gaps)
        self.gap_s.append(gap_s)
        self.alone_s.append(alone_s)


class SimExecutor:
    """An engine's Executor that only advances its clock; all its tokens are 0.

    `clock` is in seconds. Drafts are not supported. Without an `encoder`, images cost nothing.
    """

    asynchronous = False

    def __init__(
        self,
        cost: CostModel,
        *,
        num_pages: int,
        page_size: int,
        max_running: int,
        encoder: SimEncoder | None = None,
    ) -> None:
        self.cost, self.encoder = cost, encoder
        self.num_pages, self.page_size, self.max_running = num_pages, page_size, max_running
        self.clock = 0.0
        self.usage = Usage()

    def launch(self, tree: PrefixTree, batch: Batch) -> int:
        """Advance the clock by one step."""
        self.run(tree, batch, step_shape(tree, batch), 1)
        return len(batch.sampled)

    def collect(self, pending: int) -> SampledTokens:
        """The step's tokens and log-probabilities."""
        return SampledTokens([0] * pending, [0.0] * pending)

    def image(self, problem: int, tokens: int, photos: Sequence[Photo]) -> Segment:
        """The prompt segment of a problem's images, which are encoded from now on."""
        if self.encoder is None or not photos:
            return Segment(tokens)
        return Segment(tokens, ready=self.encoder.submit(problem, photos, self.clock))

    @property
    def quiet_until(self) -> float:
        """Until when no images are encoded, so that steps take the time of their cost."""
        return self.encoder.quiet_until(self.clock) if self.encoder else inf

    def run(self, tree: PrefixTree, batch: Batch, shape: StepShape, steps: int) -> None:
        """Advance the clock by `steps` steps of a batch, the first with this shape.

        The last one must be the first that ends at `quiet_until` or later, or an earlier one.
        """
        cost, usage, start = self.cost, self.usage, self.clock
        alone_s = cost.seconds(shape, steps)
        self.clock += alone_s
        if self.encoder and (tower_s := self.encoder.beside(alone_s, start)):
            added_s = tower_s - self.encoder.machine.overlap * min(alone_s, tower_s)
            self.clock += added_s
            usage.tower_s += added_s
        usage.steps += steps
        usage.bytes += cost.work.bytes(shape, steps, cost.shared_reads)
        usage.flops += cost.work.flops(shape, steps)
        if cost.shared_reads:
            saved = steps * (shape.kv_read_unshared - shape.kv_read)
            usage.bytes_saved += saved * cost.work.kv_token_bytes
        usage.add(start, self.clock, len(batch.decode), 1 - tree.free_pages / tree.num_pages)
        if batch.decode:
            gaps = sum(min(steps, rollout.scheduled - 1) for rollout in batch.decode)
            usage.add_gaps(gaps, (self.clock - start) / steps, alone_s / steps)
        if batch.chunks:
            decode_s = cost.seconds(step_shape(tree, Batch(batch.decode))) if batch.decode else 0.0
            usage.prefill_s += alone_s - decode_s

    def wait(self, tree: PrefixTree, until: float) -> bool:
        """Encode images while there is no step: to the end of a batch of views, or to the next
        image from the host, but at most to `until`. Returns False without images."""
        start = self.clock
        quiet_until = self.quiet_until
        if self.encoder is None or quiet_until == inf:
            return False
        if quiet_until > start:
            self.clock = min(quiet_until, until)
            return True
        seconds = self.encoder.run(min(self.encoder.batch_s(start), until - start), start)
        self.clock += seconds
        self.usage.tower_s += seconds
        self.usage.add(start, self.clock, 0, 1 - tree.free_pages / tree.num_pages)
        return True


def step_shape(tree: PrefixTree, batch: Batch) -> StepShape:
    """The shape of a batch's next step; the scheduler has already appended the step's tokens."""
    leaf_tokens = 0
    members: dict[Group, int] = {}
    for rollout in batch.decode:
        leaf_tokens += rollout.scheduled
        members[rollout.group] = members.get(rollout.group, 0) + 1
    segments: dict[int, int] = {}  # node -> number of its tokens that are read
    unshared = leaf_tokens
    for group, count in members.items():
        unshared += count * (group.prompt_tokens - 1)
        segments.update((segment.node, segment.tokens) for segment in group.path)
    pairs, rows = unshared, len(batch.decode)
    for chunk in batch.chunks:
        *above, node = tree.path(chunk.owner.node)
        segments.update((upper, tree.length(upper)) for upper in above)
        segments[node] = chunk.stop
        new = chunk.stop - chunk.start
        context = sum(map(tree.length, above)) + chunk.start
        unshared += context + new
        pairs += new * context + new * (new + 1) // 2
        rows += new
    read = leaf_tokens + sum(segments.values())
    return StepShape(rows, len(batch.sampled), read, unshared, pairs, len(segments))
