"""The executor: runs the scheduler's batches on the model.

On a GPU, a batch that only decodes is a CUDA graph (decode_graph.py); while the scheduler repeats
it, the host only replays. Any other batch, with prompts, drafts or different sampling parameters,
runs op by op. Tokens stay on the device from step to step; each step's tokens are copied to the
host while the next step runs. On a CPU, `launch` computes the step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.prefix_plan import PrefixPlan
from kernels.runtime.staging import Packed
from model.decoder import Step
from model.errors import InputError
from model.kv_cache import PAGE_SIZE, page_bytes
from model.step3vl import Step3VL
from pacore_sched.engine.compile_ahead import warm_up
from pacore_sched.engine.decode_graph import DecodeGraphs, default_buckets
from pacore_sched.engine.decode_step import (
    DecodeStep,
    LastTokens,
    RowSampler,
    advances,
)
from pacore_sched.engine.image_encoder import Features, ImageEncoder
from pacore_sched.engine.kv_memory import image_budget, pages_that_fit
from pacore_sched.engine.launch_sites import engine_sites
from pacore_sched.engine.logprobs import joined, score, unpacked_results
from pacore_sched.engine.step_rows import (
    Prompt,
    PromptScores,
    ScoredRows,
    StepRows,
    build_step_rows,
)
from pacore_sched.engine.step_timer import StepEvents, StepStats, StepTimer
from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.request import Batch, Rollout, SampledTokens, Segment
from pacore_sched.sched.step_batch import StepBatch
from pacore_sched.sched.view_queue import DEFAULT_VISION_BUDGET
from pacore_sched.sched.vision_pace import VisionPace, slowdown_of

if TYPE_CHECKING:
    from model.vision.image import Views


@dataclass(frozen=True)
class PendingStep:
    """A launched step."""

    results: Tensor  # int32 (logprobs.py), on the host
    order: Sequence[int]  # the results' columns, in the order of `batch.sampled`
    scored: Sequence[ScoredRows]  # whose columns follow
    events: StepEvents | None
    decodes: bool  # whether rollouts decode in it


class _PreparedStep(NamedTuple):
    """A step to be launched."""

    run: Callable[[], Tensor]  # returns the results
    order: Sequence[int]
    rows: int
    scored: Sequence[ScoredRows] = ()


@dataclass
class _CachedDecode:
    """A decode-only batch, ready to run again while the scheduler repeats it."""

    batch: Batch
    run: Callable[[], Tensor]
    order: list[int]
    rows: int  # of the step, including padding
    node: int  # of one rollout; its length grows by one in every step
    length: int
    steps_left: int  # steps for which its pages have room
    advances: bool  # whether the model's attention follows the advanced plan


class ModelExecutor:
    """A model with its KV pages. Call `close`, or use it as a context manager, to end its thread.

    num_pages: KV pages; by default as many as fit in free memory (kv_memory.py)
    kv_dtype: dtype of the KV: the model's, or torch.float8_e4m3fn
    max_running: rollouts that decode at the same time
    max_kv_tokens: the most tokens ever in use; by default a full context for each rollout
    min_kv_tokens: tokens for which the KV must have room
    image_bytes: budget for the image embeddings of running problems; by default a share of free
        memory (kv_memory.py). Who admits problems keeps to it (answers/pacore.py)
    keep_images: whether embeddings stay for prompts with the same images, while there is room
    vision_budget: how much encoding images may slow decoding, a name in VISION_BUDGETS
    vision_batch: patches of images that are encoded together (ImageEncoder's max_patches)
    share: share of free memory for KV and image embeddings, if `num_pages` is not given
    step_bytes: memory that the largest step must find free, in that case
    buckets: numbers of rows for which CUDA graphs are captured

    Raises InputError if the KV does not fit in memory, `image_bytes` is negative, or the budget's
    name is unknown.
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
        image_bytes: int | None = None,
        keep_images: bool = False,
        vision_budget: str = DEFAULT_VISION_BUDGET,
        vision_batch: int | None = None,
        share: float | None = None,
        step_bytes: int = 0,
        buckets: Sequence[int] | None = None,
    ) -> None:
        self.keep_images, self._vision_batch = keep_images, vision_batch
        self._vision_pace = VisionPace(slowdown_of(vision_budget))
        self.model, self.max_running, self.page_size = model, max_running, PAGE_SIZE
        self.asynchronous = model.device.type == "cuda"
        config, kv_dtype = model.config.decoder, kv_dtype or model.dtype
        if image_bytes is None:
            kv_bytes = (num_pages or 0) * page_bytes(config, kv_dtype)
            image_bytes = image_budget(model.config, device=model.device, kv_bytes=kv_bytes)
        if image_bytes < 0:
            raise InputError(f"image_bytes must be at least 0, not {image_bytes}")
        self.image_bytes = image_bytes
        self.num_pages = num_pages or pages_that_fit(
            config,
            device=model.device,
            dtype=kv_dtype,
            max_kv_tokens=max_kv_tokens or max_running * config.max_positions,
            min_kv_tokens=min_kv_tokens,
            image_bytes=image_bytes,
            step_bytes=step_bytes,
            share=share,
        )
        # One page that the scheduler does not know, for padding rows.
        self.cache = model.new_cache(self.num_pages + 1, kv_dtype)
        self.stats = StepStats()
        self._last_tokens = LastTokens(max_running, model.device)
        self._timer = StepTimer(self.stats, model.device)
        self.graphs = DecodeGraphs(
            model, self.cache, self._last_tokens, buckets or default_buckets(max_running)
        )
        if not {None, "triton"}.isdisjoint(model.impl.values()):
            args = (model.config, model.dtype, self.cache.k.dtype, self.graphs.buckets)
            warm_up(engine_sites(*args), model.device)
        self._cached_decode: _CachedDecode | None = None
        self._encoder: ImageEncoder | None = None
        self._on_host: dict[Rollout, list[Tensor]] = {}

    def segment(
        self,
        ids: Sequence[int],
        features: Features | None = None,
        first_feature: int = 0,
        scores: PromptScores | None = None,
        salt: str = "",
    ) -> Segment:
        """A run of prompt ids; its `<im_patch>` ids take rows `first_feature`, ... of `features`.

        scores: filled in when the segment, which must begin its prompt, is prefilled: all of it
        salt: as of Segment

        Raises InputError for ids outside the vocabulary, or more `<im_patch>` ids than features.
        """
        config = self.model.config
        placeholder_id = config.tokens.im_patch if self.model.vision else None
        prompt = Prompt.of(
            ids, config.decoder.vocab_size, placeholder_id, features, first_feature, scores
        )
        ready = features.ready if features and prompt.placeholders else lambda: True
        return Segment(len(ids), prompt, ready, prompt.content, salt)

    def encode(self, views: Sequence["Views"], salt: str = "") -> Features:
        """Start to encode images while steps run, if no prompt with this salt has had them before.
        Raises InputError if the model takes none."""
        if self._encoder is None:
            row_bytes = self.model.config.decoder.hidden * self.model.dtype.itemsize
            max_rows = self.image_bytes // row_bytes if self.keep_images else 0
            self._encoder = ImageEncoder(
                self.model, self._vision_pace, max_rows=max_rows, max_patches=self._vision_batch
            )
        return self._encoder.encode(views, salt)

    def feature_bytes(self, views: Sequence["Views"]) -> int:
        """Bytes of the images' embeddings. Raises InputError if the model takes no images."""
        width = self.model.config.decoder.hidden * self.model.dtype.itemsize
        return self.model.count_features(views) * width

    def reset(self) -> None:
        """Forget all rollouts, after a step has failed; the next batches are of another tree.

        The KV pages, the CUDA graphs and the vision tower's thread are used again.
        """
        self._last_tokens.clear()  # another tree counts its nodes from 0 again
        self._cached_decode = None
        self._on_host.clear()
        self._vision_pace.idle()

    @torch.inference_mode()
    def launch(self, tree: PrefixTree, batch: Batch) -> PendingStep:
        """Start a step; on a GPU without waiting for it.

        After a batch with drafts, the next launch reads those rollouts' last tokens from `tokens`:
        first collect this step, and append the verified tokens. Raises what encoding an image of
        the batch raised.
        """
        with self._timer.host(), self._vision_pace.launch(bool(batch.decode)):
            self._move_pages(batch)
            decodes = not batch.chunks and not any(batch.drafts)
            step = (self._prepare_decode if decodes else self._prepare_mixed)(tree, batch)
            results, events = self._timer.step(step.run)
            self.stats.steps += 1
            self.stats.rows += step.rows
            host = torch.empty(results.shape, dtype=results.dtype, pin_memory=results.is_cuda)
            host.copy_(results, non_blocking=True)
            events = self._timer.copied(events)
            return PendingStep(host, step.order, step.scored, events, bool(batch.decode))

    def collect(self, pending: PendingStep) -> SampledTokens:
        """Wait for a step; returns what it has sampled, and fills in its prompts' scores."""
        self._timer.wait(pending.events)
        if pending.decodes:
            self._vision_pace.step_ended()
        results, stop = pending.results, len(pending.order)
        tokens, logprobs, top = unpacked_results(results[:, :stop])
        for rows in pending.scored:
            start, stop = stop, stop + len(rows.targets)
            rows.scores.fill(rows.start, unpacked_results(results[:, start:stop]))
        return SampledTokens(
            [tokens[row] for row in pending.order],
            [logprobs[row] for row in pending.order],
            top and [top[row] for row in pending.order],
        )

    def close(self) -> None:
        """End the thread that encodes images."""
        if self._encoder:
            self._encoder.close()

    def __enter__(self) -> "ModelExecutor":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _move_pages(self, batch: Batch) -> None:
        """Copy pages to the host, and back."""
        if batch.evicted:  # copies of ended rollouts make room
            still_needed = {r: copies for r, copies in self._on_host.items() if not r.finish_reason}
            self._on_host = still_needed
        for rollout, pages in batch.evicted:
            if not rollout.finish_reason:
                self._on_host[rollout] = self.cache.to_host(pages)
        for rollout, pages in batch.restored:
            self.cache.from_host(self._on_host.pop(rollout), pages)

    def _prepare_decode(self, tree: PrefixTree, batch: Batch) -> _PreparedStep:
        """A decode-only batch."""
        cached = self._cached_decode
        if (
            cached is None
            or cached.batch is not batch
            or not cached.steps_left
            or cached.advances != advances(self.model)  # `set_impl` was called
            or tree.length(cached.node) != cached.length + 1
        ):
            cached = self._cached_decode = self._build_decode(tree, batch)
        cached.steps_left -= 1
        cached.length = tree.length(cached.node)
        self.stats.padding_rows += cached.rows - len(batch.decode)
        return _PreparedStep(cached.run, cached.order, len(batch.decode))

    def _build_decode(self, tree: PrefixTree, batch: Batch) -> _CachedDecode:
        rows = build_step_rows(tree, batch)
        self._last_tokens.claim(rows.claims)
        self.stats.plans += 1
        order = [row for row, _ in rows.sampled]
        rollout_of_row = dict(rows.sampled)
        rollouts = [rollout_of_row[row] for row in range(len(order))]
        batch_indices = [rollout.batch_index for rollout in rollouts]
        seeds = [rollout.seed for rollout in rollouts]
        samplings = [rollout.group.sampling for rollout in rollouts]
        node = batch.decode[0].node
        length = tree.length(node) - 1
        graph = self.graphs.find(rows.step, samplings)
        if graph:
            steps_left = graph.fill(rows.step, batch_indices, seeds)
            rows_of_graph = graph.capacity.rows
            return _CachedDecode(
                batch, graph.replay, order, rows_of_graph, node, length, steps_left, True
            )
        model, device = self.model, self.model.device
        packed = _packed(rows.step, device, batch_indices=batch_indices, seeds=seeds)
        step, tensors = self._step(rows.step, packed), packed.tensors
        ids = self._last_tokens.tokens.index_select(0, tensors["batch_indices"])
        sampler = RowSampler.of(samplings, device)
        decode = DecodeStep(
            step, tensors["batch_indices"], tensors["seeds"], ids, sampler, advances(model)
        )
        steps_left = step.plan.steps_left + 1 if decode.advances else 1

        def run() -> Tensor:
            return decode.run(model, self.cache, self._last_tokens)

        return _CachedDecode(
            batch, run, order, len(order), node, length, steps_left, decode.advances
        )

    def _prepare_mixed(self, tree: PrefixTree, batch: Batch) -> _PreparedStep:
        """Any other batch. Its results are in order, one for each sampled row."""
        self._cached_decode = None
        rows = build_step_rows(tree, batch)
        self._last_tokens.claim(rows.claims)
        self.stats.plans += 1
        device = self.model.device
        packed = _packed(
            rows.step,
            device,
            ids=rows.ids,
            last_rows=[row for row, _ in rows.last],
            last_indices=[index for _, index in rows.last],
            sampled_rows=[row for row, _ in rows.sampled],
            sampled_indices=[rollout.batch_index for _, rollout in rows.sampled],
            sampled_seeds=[rollout.seed for _, rollout in rows.sampled],
            sampled_positions=[rows.step.positions[row] + 1 for row, _ in rows.sampled],
            placeholders=[row for image in rows.images for row in image.rows],
            targets=[id for scored in rows.scored for id in scored.targets],
        )
        for rollout in rows.drafted:  # the host will provide the last accepted token
            self._last_tokens.forget(rollout)
        step = self._step(rows.step, packed)
        samplings = [rollout.group.sampling for _, rollout in rows.sampled]
        sampler = RowSampler.of(samplings, device) if samplings else None

        def run() -> Tensor:
            return self._run_mixed(rows, step, packed.tensors, sampler)

        return _PreparedStep(run, range(len(rows.sampled)), len(rows.ids), rows.scored)

    def _run_mixed(
        self, rows: StepRows, step: Step, tensors: dict[str, Tensor], sampler: RowSampler | None
    ) -> Tensor:
        model, last_tokens = self.model, self._last_tokens
        ids = tensors["ids"].index_copy(
            0, tensors["last_rows"], last_tokens.tokens[tensors["last_indices"]]
        )
        placeholders = tensors["placeholders"].split([len(image.rows) for image in rows.images])
        images = [
            (rows_of_image, image.features.result(image.first, image.first + len(image.rows)))
            for image, rows_of_image in zip(rows.images, placeholders, strict=True)
        ]
        hidden = model.decoder(model.decoder.embed(ids, images), step, self.cache)
        results = tensors["ids"].new_empty(2, 0, dtype=torch.int32)
        if sampler:
            feeds = {"last": last_tokens.tokens, "batch_indices": tensors["sampled_indices"]}
            sampled, seeds = hidden[tensors["sampled_rows"]], tensors["sampled_seeds"]
            positions = tensors["sampled_positions"]
            results = sampler.sample(model, sampled, seeds, positions, **feeds)
        return joined([results, *self._scores(rows, tensors, hidden)]) if rows.scored else results

    def _scores(
        self, rows: StepRows, tensors: dict[str, Tensor], hidden: Tensor
    ) -> Iterator[Tensor]:
        """Results for the prompt tokens to be scored, from final hidden states [T, hidden]."""
        decoder = self.model.decoder
        targets = tensors["targets"].split([len(scored.targets) for scored in rows.scored])
        for scored, ids in zip(rows.scored, targets, strict=True):
            before = hidden[scored.first : scored.first + len(ids)]
            yield score(decoder.logits, before, ids, decoder.config.vocab_size, scored.scores.top)

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
