"""The executor: runs the scheduler's batches on the model.

A batch that only decodes is a CUDA graph on a GPU (decode_graph.py); while the scheduler repeats
it, the host does nothing but replay. Any other batch, with prompts, drafts or several ways of
sampling, runs op by op. Tokens stay on the device from step to step, and are copied to the host
once per step, beside the next one. On a CPU steps are computed when launched.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kernels.prefix_plan import PrefixPlan
from kernels.runtime.staging import Packed
from model.decoder import Step
from model.kv_cache import PAGE_SIZE
from model.step3vl import Step3VL
from pacore_sched.engine.compile_ahead import warm_up
from pacore_sched.engine.decode_graph import DecodeGraphs, default_buckets
from pacore_sched.engine.decode_step import (
    DecodeStep,
    LastTokens,
    RowSampler,
    advances,
    sampling_key,
    unpacked_results,
)
from pacore_sched.engine.image_encoder import Features, ImageEncoder
from pacore_sched.engine.kv_memory import pages_that_fit
from pacore_sched.engine.launch_sites import engine_sites
from pacore_sched.engine.step_rows import Prompt, StepRows, build_step_rows
from pacore_sched.engine.step_timer import StepEvents, StepStats, StepTimer
from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.request import Batch, Rollout, Segment
from pacore_sched.sched.step_batch import StepBatch

if TYPE_CHECKING:
    from model.vision.image import Views


@dataclass(frozen=True)
class PendingStep:
    """A launched step."""

    results: Tensor  # int32 [2, rows], on the host
    order: Sequence[int]  # the results' columns in the order of collection
    times: StepEvents | None


@dataclass
class _CachedDecode:
    """A batch that decodes, ready to be run again while the scheduler repeats it."""

    batch: Batch
    run: Callable[[], Tensor]
    order: list[int]
    rows: int  # of the step, padding included
    node: int  # of one rollout, whose length is one more in every step
    length: int
    left: int  # steps that its pages have room for


class ModelExecutor:
    """A model with its KV pages. `close` it, or use it as a context, to end its thread.

    num_pages: of KV; the default is what free memory has room for (kv_memory.py)
    kv_dtype: of the KV: the model's, or torch.float8_e4m3fn
    max_running: rollouts that decode at once
    max_kv_tokens: that could ever be in use; by default a whole context for each rollout
    min_kv_tokens: of which KV must have room
    share: of free memory for KV, if `num_pages` does not say
    buckets: numbers of rows to make CUDA graphs for

    Raises InputError if the KV does not fit into memory.
    """

    def __init__(
        self,
        model: Step3VL,
        *,
        num_pages: int | None = None,
        kv_dtype: torch.dtype | None = None,
        max_running: int = 256,
        max_kv_tokens: int | None = None,
        min_kv_tokens: int = 1,
        share: float | None = None,
        buckets: Sequence[int] | None = None,
    ) -> None:
        self.model, self.max_running, self.page_size = model, max_running, PAGE_SIZE
        self.asynchronous = model.device.type == "cuda"
        config = model.config.decoder
        self.num_pages = num_pages or pages_that_fit(
            config,
            device=model.device,
            dtype=kv_dtype or model.dtype,
            max_kv_tokens=max_kv_tokens or max_running * config.max_positions,
            min_kv_tokens=min_kv_tokens,
            share=share,
        )
        # One page more than the scheduler knows of, for rows that pad.
        self.cache = model.new_cache(self.num_pages + 1, kv_dtype)
        self.stats = StepStats()
        self._tables = LastTokens(max_running, model.device)
        self._timer = StepTimer(self.stats, model.device)
        self.graphs = DecodeGraphs(
            model, self.cache, self._tables, buckets or default_buckets(max_running)
        )
        if not {None, "triton"}.isdisjoint(model.impl.values()):
            of = (model.config, model.dtype, self.cache.k.dtype, self.graphs.buckets)
            warm_up(engine_sites(*of), model.device)
        self._standing: _CachedDecode | None = None
        self._encoder: ImageEncoder | None = None
        self._on_host: dict[Rollout, list[Tensor]] = {}

    def segment(
        self, ids: Sequence[int], features: Features | None = None, first_feature: int = 0
    ) -> Segment:
        """A run of prompt ids, whose `<im_patch>` ids take `features` from one row on, in order.

        Raises InputError for ids outside the vocabulary or more `<im_patch>` ids than features.
        """
        config = self.model.config
        hole = config.tokens.im_patch if self.model.vision else None
        prompt = Prompt.of(ids, config.decoder.vocab_size, hole, features, first_feature)
        ready = features.ready if features and prompt.holes else lambda: True
        return Segment(len(ids), inputs=prompt, ready=ready)

    def encode(self, views: Sequence["Views"]) -> Features:
        """Begin to encode images, beside the steps. Raises InputError if the model takes none."""
        self._encoder = self._encoder or ImageEncoder(self.model)
        return self._encoder.encode(views)

    @torch.inference_mode()
    def launch(self, tree: PrefixTree, batch: Batch) -> PendingStep:
        """Begin a step; on a GPU without waiting for it.

        After a batch with drafts, those rollouts' last tokens are read off `tokens`: collect it,
        and keep what it verified, before the next launch.
        Raises what encoding an image of the batch raised.
        """
        with self._timer.host():
            self._move_pages(batch)
            decodes = not batch.chunks and not any(batch.drafts)
            run, order, rows = (self._decode if decodes else self._mixed)(tree, batch)
            results, times = self._timer.step(run)
            self.stats.steps += 1
            self.stats.rows += rows
            host = torch.empty(results.shape, dtype=results.dtype, pin_memory=results.is_cuda)
            host.copy_(results, non_blocking=True)
            return PendingStep(host, order, self._timer.copied(times))

    def collect(self, pending: PendingStep) -> tuple[list[int], list[float]]:
        """A step's tokens and log-probabilities in the order of `batch.sampled`, once it is done.

        A rollout with a draft has 1 + len(draft) of them.
        """
        self._timer.wait(pending.times)
        tokens, logprobs = unpacked_results(pending.results)
        return [tokens[at] for at in pending.order], [logprobs[at] for at in pending.order]

    def close(self) -> None:
        """End the thread that encodes images."""
        if self._encoder:
            self._encoder.close()

    def __enter__(self) -> "ModelExecutor":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _move_pages(self, batch: Batch) -> None:
        """Take pages to the host, and back."""
        if batch.evicted:  # room is made by those that have ended there
            kept = {r: copies for r, copies in self._on_host.items() if not r.finish_reason}
            self._on_host = kept
        for rollout, pages in batch.evicted:
            if not rollout.finish_reason:
                self._on_host[rollout] = self.cache.to_host(pages)
        for rollout, pages in batch.restored:
            self.cache.from_host(self._on_host.pop(rollout), pages)

    def _decode(
        self, tree: PrefixTree, batch: Batch
    ) -> tuple[Callable[[], Tensor], list[int], int]:
        """Of a batch that only decodes: how to run it, its order, its rows."""
        standing = self._standing
        if (
            standing is None
            or standing.batch is not batch
            or not standing.left
            or tree.length(standing.node) != standing.length + 1
        ):
            standing = self._standing = self._stand(tree, batch)
        standing.left -= 1
        standing.length = tree.length(standing.node)
        self.stats.padding_rows += standing.rows - len(batch.decode)
        return standing.run, standing.order, len(batch.decode)

    def _stand(self, tree: PrefixTree, batch: Batch) -> _CachedDecode:
        rows = build_step_rows(tree, batch)
        self._tables.claim(rows.claims)
        self.stats.plans += 1
        order = [row for row, _ in rows.drawn]
        of_row = dict(rows.drawn)
        rollouts = [of_row[row] for row in range(len(order))]
        batch_indices = [rollout.batch_index for rollout in rollouts]
        seeds = [rollout.seed for rollout in rollouts]
        settings = [sampling_key(rollout.group.sampling) for rollout in rollouts]
        node = batch.decode[0].node
        length = tree.length(node) - 1
        graph = self.graphs.find(rows.step, settings)
        if graph:
            left = graph.fill(rows.step, batch_indices, seeds)
            return _CachedDecode(
                batch, graph.replay, order, graph.capacity.rows, node, length, left
            )
        model, device = self.model, self.model.device
        packed = _packed(rows.step, device, batch_indices=batch_indices, seeds=seeds)
        step, of_rows = self._step(rows.step, packed), packed.tensors
        ids = self._tables.last.index_select(0, of_rows["batch_indices"])
        drawing = RowSampler.of(settings, device)
        decode = DecodeStep(
            step, of_rows["batch_indices"], of_rows["seeds"], ids, drawing, advances(model)
        )
        left = step.plan.room + 1 if decode.advances else 1

        def run() -> Tensor:
            return decode.run(model, self.cache, self._tables)

        return _CachedDecode(batch, run, order, len(order), node, length, left)

    def _mixed(self, tree: PrefixTree, batch: Batch) -> tuple[Callable[[], Tensor], range, int]:
        """Of any other batch: the same. Its results are in order, one for each row drawn from."""
        self._standing = None
        rows = build_step_rows(tree, batch)
        self._tables.claim(rows.claims)
        self.stats.plans += 1
        device = self.model.device
        packed = _packed(
            rows.step,
            device,
            ids=rows.ids,
            last_rows=[row for row, _ in rows.last],
            last_indices=[index for _, index in rows.last],
            drawn_rows=[row for row, _ in rows.drawn],
            drawn_indices=[rollout.batch_index for _, rollout in rows.drawn],
            drawn_seeds=[rollout.seed for _, rollout in rows.drawn],
            drawn_positions=[rows.step.positions[row] + 1 for row, _ in rows.drawn],
            holes=[row for patch in rows.patches for row in patch.rows],
        )
        for rollout in rows.drafted:  # the host will say which of its tokens is the last
            self._tables.forget(rollout)
        step = self._step(rows.step, packed)
        settings = [sampling_key(rollout.group.sampling) for _, rollout in rows.drawn]
        drawing = RowSampler.of(settings, device) if settings else None

        def run() -> Tensor:
            return self._run_mixed(rows, step, packed.tensors, drawing)

        return run, range(len(rows.drawn)), len(rows.ids)

    def _run_mixed(
        self, rows: StepRows, step: Step, given: dict[str, Tensor], drawing: RowSampler | None
    ) -> Tensor:
        model, tables = self.model, self._tables
        ids = given["ids"].index_copy(0, given["last_rows"], tables.last[given["last_indices"]])
        holes = given["holes"].split([len(patch.rows) for patch in rows.patches])
        images = [
            (place, patch.features.result()[patch.first : patch.first + len(patch.rows)])
            for patch, place in zip(rows.patches, holes, strict=True)
        ]
        hidden = model.decoder(model.decoder.embed(ids, images), step, self.cache)
        if drawing is None:
            return given["ids"].new_empty(2, 0, dtype=torch.int32)
        feeds = {"last": tables.last, "batch_indices": given["drawn_indices"]}
        hidden, seeds = hidden[given["drawn_rows"]], given["drawn_seeds"]
        return drawing.draw(model, hidden, seeds, given["drawn_positions"], **feeds)

    def _step(self, step: StepBatch, packed: Packed) -> Step:
        plan = PrefixPlan.build(
            step.plan_nodes,
            num_rows=len(step.positions),
            num_pages=self.cache.num_pages,
            page_size=self.page_size,
            device=self.model.device,
        )
        return Step(packed.tensors["positions"], packed.tensors["slots"], plan)


def _packed(step: StepBatch, device: torch.device, **lists: Sequence[int]) -> Packed:
    """Positions and slots of a step, and other lists of ints, as int64 tensors."""
    arrays = {name: np.array(values, np.int64) for name, values in lists.items()}
    arrays |= {"positions": np.array(step.positions), "slots": np.array(step.slots)}
    packed = Packed(
        {name: array.shape for name, array in arrays.items()}, dtype=torch.int64, device=device
    )
    packed.fill(arrays)
    return packed
