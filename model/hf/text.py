"""Decoders of transformers with our ops: Qwen3, Llama, and the text model of Qwen3-VL.

rms_norm       the norms of hidden states, the second one of a layer together with the residual add
silu_mul       the activation and product of the feed-forward block
qk_norm_rope   norms of q and k, their rotation, and K and V in the layout that attention reads;
               with a `PagedCache` straight into its pages, where `rotary_attention` follows

Angles are exact, and rounded to the model's dtype once; transformers rounds cos, sin and both
products to bf16. Under YaRN, K is kept without the attention factor, whose square is part of the
scale of the scores.
"""

import sys
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.activation import silu_mul
from kernels.kv_pages import KVPages
from kernels.norm import rms_norm
from kernels.prefix_attention import prefix_attention
from kernels.qk_norm_rope import qk_norm_rope
from kernels.rotary_attention import rotary_attention
from kernels.rotary_tables import RotaryTables, rotary_frequencies
from kernels.runtime.dispatch import check, default_impl
from model.hf.paged_attention import check_causal
from model.hf.parts import Family, Module, Part, check_activation, impl_of, joined


class Rotation(NamedTuple):
    """What a patched rotary embedding returns in place of cos and sin."""

    frequencies: Tensor  # int64 [R/2], see `qk_norm_rope`
    positions: Tensor  # int [T], or [3, T] with `section`
    section: tuple[int, int, int] | None
    score_factor: float
    tables: list[RotaryTables]  # added by the first layer, for all

    def tables_of(self, slots: Tensor, pages: KVPages, impl: str | None) -> RotaryTables | None:
        """What the portable form computes from positions and slots, which all layers share."""
        if torch.compiler.is_compiling() or self.section is not None:
            return None
        if (impl or default_impl(slots.device)) != "portable":
            return None
        if not self.tables:
            positions = self.positions[:, None]
            self.tables.append(RotaryTables.of(self.frequencies, positions, slots, pages))
        return self.tables[0]


def _norm(self: Module, hidden_states: Tensor) -> Tensor:
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    out = rms_norm(rows, self.weight, eps=self.variance_epsilon, impl=impl_of(self))
    return out.view(hidden_states.shape)


def _layer(self: Module, hidden_states: Tensor, **options: Any) -> Tensor:
    shape = hidden_states.shape
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **options)
    norm = self.post_attention_layernorm
    rows, residual = rms_norm(
        attended.reshape(-1, shape[-1]),
        norm.weight,
        eps=norm.variance_epsilon,
        residual=hidden_states.reshape(-1, shape[-1]),
        impl=impl_of(self),
    )
    return residual.view(shape) + self.mlp(rows.view(shape))


def _mlp(self: Module, x: Tensor) -> Tensor:
    gate_up = joined(x, self.gate_proj, self.up_proj)
    return self.down_proj(silu_mul(gate_up, impl=impl_of(self))).view(*x.shape[:-1], -1)


def _check_mlp(module: Module) -> None:
    check_activation(module.act_fn, F.silu, "silu")


def _check_layer(module: Module) -> None:
    """Its second norm is computed together with the residual add."""
    norm = module.post_attention_layernorm
    name = type(module).__name__.removesuffix("DecoderLayer") + "RMSNorm"
    check(type(norm).__name__ == name, f"its norm is {type(norm).__name__}, not {name}")


def _rotary(self: Module, x: Tensor, position_ids: Tensor) -> Rotation:
    section = getattr(self, "mrope_section", None)
    batch, tokens = x.shape[:2]
    shape = (batch, tokens) if section is None else (3, batch, tokens)
    return Rotation(
        self.pacore_frequencies,
        position_ids.expand(shape).flatten(-2).contiguous(),
        None if section is None else tuple(section),
        self.attention_scaling**2,
        [],
    )


def _check_rotary(module: Module) -> None:
    kind = module.rope_type
    changes = kind in ("dynamic", "longrope")
    check(not changes, f"rope_type {kind!r} has frequencies that change with length")


def _frequencies(module: Module) -> dict[str, Tensor]:
    frequencies = rotary_frequencies(module.inv_freq)
    return {"frequencies": frequencies.to(module.inv_freq.device)}


def _attention(
    self: Module,
    hidden_states: Tensor,
    position_embeddings: Rotation,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    shape, rotation = hidden_states.shape[:2], position_embeddings
    check(
        isinstance(rotation, Rotation),
        "qk_norm_rope: the attention is patched, but not the model's rotary embedding; patch the"
        " whole model",
    )
    # The cache is called past_key_values in some versions, cache in others.
    caches = [options.pop(name, None) for name in ("past_key_values", "cache")]
    cache = next((cache for cache in caches if cache is not None), None)
    qkv = joined(hidden_states, self.q_proj, self.k_proj, self.v_proj)
    scale = self.scaling * rotation.score_factor
    dropout = self.attention_dropout if self.training else 0.0
    if hasattr(cache, "begin"):  # a PagedCache, whose module imports transformers
        check_causal(self, attention_mask, dropout)
        return self.o_proj(_attend_to_pages(self, qkv, rotation, cache, scale, shape)), None
    slots = torch.arange(len(qkv), device=qkv.device)
    kv_heads = self.config.num_key_value_heads
    pages = KVPages(*qkv.new_empty(2, len(qkv), kv_heads, 1, self.head_dim))  # a token per page
    q = _rotated(self, qkv, rotation, slots, pages)
    q, k, v = (x.view(*shape, -1, self.head_dim).transpose(1, 2) for x in (q, pages.k, pages.v))
    if cache is not None:
        k, v = cache.update(k, v, self.layer_idx, kwargs=options)
    if hasattr(self, "sliding_window"):
        options["sliding_window"] = self.sliding_window
    library = _library(self)
    attend = library.ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, library.eager_attention_forward
    )
    out, weights = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=scale, **options)
    return self.o_proj(out.reshape(*shape, -1)), weights


def _attend_to_pages(
    self: Module, qkv: Tensor, rotation: Rotation, cache: Any, scale: float, shape: torch.Size
) -> Tensor:
    """Attention over a `PagedCache`, which also stores K and V: [B, S, Hq * D]."""
    cache.check_attention()
    step, pages = cache.begin(self.layer_idx, *shape), cache.pages(self.layer_idx)
    window: int = getattr(self, "sliding_window", None) or 0
    if rotation.section is None:
        tables = rotation.tables_of(step.slots, pages, impl_of(self))
        out = rotary_attention(
            *(qkv, *_norms(self), rotation.frequencies, rotation.positions, step.slots),
            pages,
            step.plan,
            scale=scale,
            eps=_eps(self),
            window=window,
            tables=tables,
            impl=(impl_of(self), cache.impl),
        )
    else:
        q = _rotated(self, qkv, rotation, step.slots, pages)
        attend: Any = prefix_attention  # without return_lse it returns one tensor
        out = attend(q, pages, step.plan, scale=scale, window=window, impl=cache.impl)
    return out.view(*shape, -1)


def _rotated(
    self: Module, qkv: Tensor, rotation: Rotation, slots: Tensor, pages: KVPages
) -> Tensor:
    """q [T, Hq, D], normalised and rotated; writes K and V to `slots` of the pages."""
    return qk_norm_rope(
        *(qkv, *_norms(self), rotation.frequencies, rotation.positions, slots),
        pages,
        eps=_eps(self),
        mrope_section=rotation.section,
        tables=rotation.tables_of(slots, pages, impl_of(self)),
        impl=impl_of(self),
    )


def _norms(self: Module) -> tuple[Tensor | None, Tensor | None]:
    """The weights of the norms of q and k, which Llama does not have."""
    norms = getattr(self, "q_norm", None), getattr(self, "k_norm", None)
    q, k = (None if norm is None else norm.weight for norm in norms)
    return q, k


def _eps(self: Module) -> float:
    norm = getattr(self, "q_norm", None)
    return 0.0 if norm is None else norm.variance_epsilon


def _library(module: Module) -> ModuleType:
    """The library's module that defines the class of `module`."""
    return sys.modules[type(module).__module__]


def _family(name: str, prefix: str) -> Family:
    parts = {
        "RMSNorm": Part("rms_norm", _norm),
        "DecoderLayer": Part("rms_norm", _layer, _check_layer),
        "MLP": Part("silu_mul", _mlp, _check_mlp),
        "RotaryEmbedding": Part("qk_norm_rope", _rotary, _check_rotary, _frequencies),
        "Attention": Part("qk_norm_rope", _attention),
    }
    return Family(
        f"transformers.models.{name}.modeling_{name}",
        {prefix + part: how for part, how in parts.items()},
        frozenset({prefix + "Model", prefix + "ForCausalLM"}),
    )


FAMILIES = (
    _family("qwen3", "Qwen3"),
    _family("llama", "Llama"),
    _family("qwen3_vl", "Qwen3VLText"),
)
