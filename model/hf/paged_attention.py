"""Attention of transformers' models over the pages of a `PagedCache`.

It is registered with transformers as "pacore_paged". `PagedCache.update` passes it the pages and
the cache in the place of keys and values. It needs no masks: the plan of a step says what each row
sees.
"""

from typing import Any

from torch import Tensor, nn

from kernels.kv_pages import KVPages
from kernels.prefix_attention import prefix_attention
from kernels.runtime.dispatch import check

NAME = "pacore_paged"


def register() -> None:
    """Make `NAME` an attention implementation of transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, paged_attention)
    AttentionMaskInterface.register(NAME, no_mask)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: KVPages,
    value: Any,  # noqa: ANN401
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention's output [B, S, Hq, D] of query [B, Hq, S, D], and no weights.

    key, value: the pages and the cache, as returned by `PagedCache.update`
    kwargs: what models pass to every attention, without effect here

    Raises ValueError without a `PagedCache`, and for what the op does not compute.
    """
    if not isinstance(key, KVPages):
        raise ValueError(f"attention {NAME!r} needs a PagedCache: pass one as the model's cache")
    check_causal(module, attention_mask, dropout)
    check(softcap is None, f"{NAME}: capped scores (softcap) are not supported")
    check(s_aux is None, f"{NAME}: attention sinks (s_aux) are not supported")
    batch, _, tokens, dim = query.shape
    window = sliding_window or getattr(module, "sliding_window", None)  # not every model passes it
    out = prefix_attention(
        query.transpose(1, 2).flatten(0, 1),
        key,
        value.step.plan,
        scale=dim**-0.5 if scaling is None else scaling,
        window=window or 0,
        impl=value.impl,
    )
    assert isinstance(out, Tensor)  # without return_lse
    return out.unflatten(0, (batch, tokens)), None


def check_causal(module: nn.Module, attention_mask: Tensor | None, dropout: float) -> None:
    """Raise ValueError for what the plan of a step does not say."""
    check(getattr(module, "is_causal", True), f"{NAME}: only causal attention is supported")
    check(attention_mask is None, f"{NAME}: only causal masks are supported, without padding")
    check(not dropout, f"{NAME}: dropout is not supported")


def no_mask(
    *args: object,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    config: object = None,
    **kwargs: object,
) -> None:
    """No mask. Raises ValueError for padding, and for masks that are not causal.

    local_size: the tokens of a sliding window, which layers pass on themselves, or of a chunk
    """
    if attention_mask is not None and not attention_mask.all():
        raise ValueError(
            f"{NAME}: padding is not supported: pass prompts of equal length, or one at a time"
        )
    check(allow_is_causal_skip, f"{NAME}: only causal masks are supported")
    window = getattr(config, "sliding_window", None)
    check(local_size in (None, window), f"{NAME}: chunked attention is not supported")
