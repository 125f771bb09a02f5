"""The engine's kernel launches, as sites for `compile_ahead` that run on CPU tensors.

Kernels depend on a model's widths, not on its layers or weights, so one layer without weights is
enough. Steps are built as the executor builds them. Sizes cover each class that kernels
distinguish: row tiles, and numbers of rows that are or are not divisible by 16.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from kernels.compile.worker import Site
from kernels.prefix_plan import Capacity, PrefixPlan
from kernels.sampling import SampleOutput, sample
from model.config import Config
from model.decoder import Step
from model.step3vl import Step3VL
from pacore_sched.engine.decode_graph import (
    MIN_LEVELS,
    DecodeGraph,
    default_buckets,
    node_row_limits,
)
from pacore_sched.engine.decode_step import LastTokens, SamplingKey
from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.step_batch import build_step_batch

# Plain (the default), greedy, and truncated; then the processed log-probabilities that launch other
# kernels than raw ones.
SAMPLING_KEYS = (
    SamplingKey(1.0, 0, 1.0),
    SamplingKey(0.0, 0, 1.0),
    SamplingKey(1.0, 20, 1.0),
    SamplingKey(1.0, 0, 0.95),
    SamplingKey(1.0, 20, 0.95),
    SamplingKey(0.6, 0, 1.0, "processed"),
    SamplingKey(0.0, 0, 1.0, "processed"),
    SamplingKey(1.0, 20, 0.95, "processed"),
)
CHUNKS = (1, 4, 16, 100, 2048)  # prompt tokens of a step
DECODING = (1, 4, 16, 32)  # rollouts in the same step, or in steps without CUDA graphs
IMAGES = ((1, 0), (1, 3), (1, 9))  # global views, crops
PAGES = 64


def engine_sites(
    config: Config,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None,
    buckets: Sequence[int] | None = None,
) -> list[Site]:
    """Everything that an engine on such a model launches: images, prompts and decode steps.

    buckets: numbers of rows for which CUDA graphs are captured
    """
    args = (config, dtype, kv_dtype or dtype)
    sites: list[Site] = [
        partial(launch_graph, *args, rows) for rows in buckets or default_buckets(64)
    ]
    steps = {(chunk, rows) for chunk in CHUNKS for rows in (0, *DECODING)}
    steps |= {(0, rows) for rows in DECODING}
    sites += [partial(launch_step, *args, *step) for step in sorted(steps)]
    if config.vision:
        sites += [partial(launch_images, config, dtype, *counts) for counts in IMAGES]
    return sites


def launch_graph(config: Config, dtype: torch.dtype, kv_dtype: torch.dtype, rows: int) -> None:
    """The launches in the CUDA graphs of decode steps of up to `rows` rollouts."""
    model = one_layer(config, dtype)
    group = config.decoder.heads // config.decoder.kv_heads
    for max_node_rows in node_row_limits(rows, group):
        cache, last_tokens = model.new_cache(PAGES, kv_dtype), LastTokens(rows, model.device)
        capacity = Capacity(rows, max_node_rows, MIN_LEVELS)
        DecodeGraph(model, cache, last_tokens, capacity, SAMPLING_KEYS[0], _Uncaptured, None)
    _sample(model, rows)


def launch_step(
    config: Config, dtype: torch.dtype, kv_dtype: torch.dtype, chunk: int, rollouts: int
) -> None:
    """A step that writes `chunk` tokens of a prompt while rollouts of another prompt decode."""
    model = one_layer(config, dtype)
    tree = PrefixTree(PAGES + rollouts, model.new_cache(1).page_size)
    work = []
    if chunk:
        work.append((tree.add(), chunk))
        tree.append(work[0][0], chunk)
    if rollouts:
        root = tree.add()
        tree.append(root, 100)
        for _ in range(rollouts):
            work.append((tree.add(root), 1))
            tree.append(work[-1][0], 1)
    batch = build_step_batch(tree, work)
    cache = model.new_cache(PAGES + rollouts, kv_dtype)
    plan = PrefixPlan.build(
        batch.plan_nodes,
        num_rows=len(batch.positions),
        num_pages=cache.num_pages,
        page_size=cache.page_size,
    )
    step = Step(torch.tensor(batch.positions), torch.tensor(batch.slots), plan)
    model.decoder(model.decoder.embed(torch.zeros_like(step.positions)), step, cache)
    if not chunk:
        step.advance()
    _sample(model, len(batch.last_rows))


def launch_images(config: Config, dtype: torch.dtype, whole: int, crops: int) -> None:
    """The vision tower on `whole` global views and `crops` crops."""
    tower, vision = one_layer(config, dtype).vision, config.vision
    assert tower is not None and vision is not None
    sizes = [vision.crop_size] * crops + [vision.grid * vision.patch_size] * whole
    tower([torch.empty(3, size, size, dtype=dtype) for size in sizes])


@cache
def one_layer(config: Config, dtype: torch.dtype) -> Step3VL:
    """A model of these widths with one layer of uninitialised weights."""
    decoder = replace(config.decoder, layers=1)
    vision = config.vision and replace(config.vision, layers=1)
    return Step3VL(replace(config, decoder=decoder, vision=vision), dtype=dtype)


def _sample(model: Step3VL, rows: int) -> None:
    logits = torch.empty(rows, model.config.decoder.vocab_size, dtype=model.dtype)
    seeds = torch.zeros(rows, dtype=torch.int64)
    table = {"last": seeds, "batch_indices": seeds}
    for feeds in ({"ids": seeds, **table}, table, {}):  # decode steps, with prompts, in parts
        out = SampleOutput.of(rows, model.device, **feeds)
        for key in SAMPLING_KEYS:
            sample(logits, seeds, seeds, **key._asdict(), out=out)


class _Uncaptured:
    """Stands in for a CUDA graph: runs its body, once at construction and at each replay."""

    def __init__(self, body: Callable[[], Tensor], device: torch.device, pool: object) -> None:
        self.replay = body
        body()
