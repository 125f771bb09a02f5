"""A transformers `Cache` over our pages, in which continuations of a prompt share its KV.

    cache = PagedCache(model.config, device=model.device, dtype=model.dtype)
    model(prompt, cache=cache)  # [1, P]: its KV is written once
    cache.batch_repeat_interleave(16)  # nothing is copied
    model(tokens, cache=cache)  # [16, S]: each row reads the prompt's pages, and writes its own

Attention must read pages: `model.set_attn_implementation("pacore_paged")` after
`paged_attention.register()`, or code that calls our ops itself:

    step = cache.begin(layer_idx, batch, tokens)  # once per layer, in order
    pages = cache.pages(layer_idx)
    out = rotary_attention(qkv, ..., step.positions, step.slots, pages, step.plan, ...)

Rows are [batch, tokens], flattened. There is no padding: all rows have the same length.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig

from kernels.kv_pages import KVPages
from model.decoder import Step
from model.hf.page_tree import PageTree
from model.hf.paged_attention import NAME
from model.kv_cache import PAGE_SIZE


class PagedCache(Cache):
    """The KV pages of each layer of a decoder, which grow as sequences do.

    config: of the model
    impl: of attention: "eager", "portable" or "triton"; None takes Triton on CUDA, else portable
    """

    layers: list[Any]  # the KVPages of each
    is_compileable = False
    is_croppable = False
    is_initialized = True

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        impl: str | None = None,
    ) -> None:
        self.config, self.impl = config.get_text_config(decoder=True), impl
        heads = self.config.num_attention_heads
        kv_heads = getattr(self.config, "num_key_value_heads", None) or heads
        head_dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        no_pages = torch.zeros(0, kv_heads, PAGE_SIZE, head_dim, device=device, dtype=dtype)
        layers: list[Any] = [KVPages(no_pages, no_pages)] * self.config.num_hidden_layers
        super().__init__(layers=layers)
        self._tree = PageTree(PAGE_SIZE, no_pages.device, advances=impl != "eager")
        self._head = torch.arange(kv_heads, device=no_pages.device)
        self._next_layer = 0

    def begin(self, layer_idx: int, batch: int, tokens: int) -> Step:
        """The step that writes `tokens` tokens to each of `batch` sequences: positions and slots
        [batch * tokens], and the plan. Layer 0 begins it, and all layers share it.

        Raises ValueError if the cache has a different number of sequences, or if an earlier step
        did not reach all layers, so that they hold different tokens.
        """
        if layer_idx != self._next_layer:
            raise ValueError("PagedCache: the last step did not reach all layers: call reset()")
        if layer_idx == 0:
            self._tree.append(batch, tokens)
        self._next_layer = (layer_idx + 1) % len(self.layers)
        return self.step

    @property
    def step(self) -> Step:
        """The step that `begin` returned last."""
        return self._tree.step

    def pages(self, layer_idx: int) -> KVPages:
        """The layer's pages, as many as the current step's plan needs."""
        pages: KVPages = self.layers[layer_idx]
        more = self._tree.num_pages - pages.num_pages
        if more:
            pages = pages.map(lambda x: torch.cat([x, x.new_zeros(more, *x.shape[1:])]))
            self.layers[layer_idx] = pages
        return pages

    def update(  # type: ignore[override]  # only `paged_attention` reads what it returns
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[KVPages, "PagedCache"]:
        """Write K and V [B, Hkv, S, D] to the layer's pages; returns what `paged_attention` takes.

        Raises ValueError if the model runs with another attention.
        """
        self.check_attention()
        batch, _, tokens, dim = key_states.shape
        slots, pages = self.begin(layer_idx, batch, tokens).slots[:, None], self.pages(layer_idx)
        if layer_idx == 0:
            tile = slots // PAGE_SIZE * len(self._head) + self._head
            # Where each row's heads are stored, in pages viewed as rows of D elements.
            self._stored = (tile * PAGE_SIZE + slots % PAGE_SIZE).flatten()
        for target, states in ((pages.k, key_states), (pages.v, value_states)):
            rows = states.transpose(1, 2).flatten(0, 2)
            target.view(-1, dim).index_copy_(0, self._stored, rows)
        return pages, self

    def check_attention(self) -> None:
        """Raise ValueError unless the model attends to pages, without masks."""
        attention = self.config._attn_implementation
        if attention != NAME:
            raise ValueError(
                f"a PagedCache needs attention {NAME!r}, not {attention!r}: call"
                f" paged_attention.register() and model.set_attn_implementation({NAME!r})"
            )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Continue every sequence `repeats` times, which share its pages."""
        self._tree.fork(repeats)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of a sequence."""
        return self._tree.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Tokens of a sequence after the next step, and the first one's position."""
        return self._tree.length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no limit."""
        return -1

    @property
    def batch_size(self) -> int:
        """The number of sequences; -1 before the first step."""
        return self._tree.sequences or -1

    def reset(self) -> None:
        """Remove all sequences; the pages remain allocated."""
        self._tree.clear()
        self._next_layer = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the order. Raises ValueError for another, as in beam search."""
        if beam_idx.tolist() != [*range(self._tree.sequences)]:
            _refuse("sequences cannot be reordered, as beam search does")

    def crop(self, tokens_to_remove: int) -> None:
        """Remove nothing. Raises ValueError for tokens to remove."""
        if tokens_to_remove:
            _refuse("tokens cannot be removed, as assisted generation does")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Raises ValueError."""
        _refuse("sequences cannot be selected, as contrastive search does")


def _refuse(what: str) -> NoReturn:
    raise ValueError(f"PagedCache: {what}")
