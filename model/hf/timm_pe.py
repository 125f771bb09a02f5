"""timm's PE vision towers with our ops: PE-lang, PE-core and PE-spatial, class `Eva`.

vision_attention    the rotation of q and k, and attention, in towers without a class token
layer_norm          all norms; the second one of a block together with LayerScale and residual add
linear_quick_gelu   the first half of the feed-forward block, if its activation is quick_gelu

timm builds these towers with the exact GELU, and rescales positions to `ref_feat_shape`. Towers
that were trained otherwise, such as STEP3-VL's, have `block.mlp.act` replaced, and no
`ref_feat_shape` or that of their grid.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels.runtime.dispatch import check
from model.hf.parts import Family, Module, Part, impl_of
from model.hf.vision import (
    Axial,
    attend,
    check_norm,
    check_quick_gelu,
    expand,
    norm,
    norm_of_sum,
)


def _embed(self: Module, shape: Sequence[int] = (), dtype: torch.dtype | None = None) -> Axial:
    """grid_offset may be anything: attention depends on differences of positions only."""
    rows, columns = self.feat_shape or shape
    _check_scale(self, (rows, columns))
    return Axial((rows, columns), float(self.temperature))


def _attention(
    self: Module,
    x: Tensor,
    rope: Axial | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    check(attn_mask is None and not is_causal, "vision_attention: takes no mask")
    out = attend(self, self.qkv(x).flatten(0, 1), len(x), rope)
    return self.proj_drop(self.proj(out)).unflatten(0, x.shape[:2])


def _block(
    self: Module,
    x: Tensor,
    rope: object = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    h = self.attn(self.norm1(x), rope=rope, attn_mask=attn_mask, is_causal=is_causal)
    h, x = norm_of_sum(self.norm2, self.drop_path1(h), x, self.gamma_1, impl_of(self))
    h = self.drop_path2(self.mlp(h))
    return x + h if self.gamma_2 is None else torch.addcmul(x, self.gamma_2, h)


def _mlp(self: Module, x: Tensor) -> Tensor:
    h = self.norm(self.drop1(expand(self, x)))
    return self.drop2(self.fc2(h))


def _check_embed(module: Module) -> None:
    kind = getattr(module, "grid_type", "index")
    check(kind == "index", f"grid_type is {kind!r}, not 'index'")
    check(not module.in_pixels, "its positions are in pixels, not patches")
    check(
        module.grid_indexing == "xy",
        f"grid_indexing is {module.grid_indexing!r}, not 'xy': a head's first half must rotate with"
        " the column",
    )
    if module.feat_shape is not None:
        _check_scale(module, tuple(module.feat_shape))


def _check_scale(module: Module, grid: tuple[int, ...]) -> None:
    ref = module.ref_feat_shape
    check(
        ref is None or tuple(ref) == grid,
        f"ref_feat_shape {ref} rescales the positions of the grid {grid}; vision_attention takes"
        " indices of patches",
    )


def _check_attention(module: Module) -> None:
    tokens = module.num_prefix_tokens
    check(tokens == 0, f"{tokens} class or register tokens come before the patches")
    check(not module.rotate_half, "it rotates halves of a head, not adjacent pairs")
    check(module.qkv is not None, "its projections are separate, not qkv")
    check(module.gate is None, "it has a gate")
    for name in ("q_norm", "k_norm", "norm"):
        check(isinstance(getattr(module, name), nn.Identity), f"it has a norm, {name}")


def _check_block(module: Module) -> None:
    check_norm(module.norm2)


def _check_mlp(module: Module) -> None:
    check(hasattr(module.fc1, "in_features"), "fc1 is a convolution")
    check_quick_gelu(module.act)


def _others(module: str, *names: str) -> Family:
    return Family(f"timm.{module}", {}, frozenset(names))


FAMILIES = (
    Family(
        "timm.models.eva",
        {"EvaBlock": Part("layer_norm", _block, _check_block)},
        frozenset({"Eva"}),
    ),
    Family(
        "timm.layers.pos_embed_sincos",
        {"RotaryEmbeddingCat": Part("vision_attention", _embed, _check_embed, method="get_embed")},
    ),
    Family(
        "timm.layers.attention",
        {"AttentionRope": Part("vision_attention", _attention, _check_attention)},
    ),
    Family("timm.layers.norm", {"LayerNorm": Part("layer_norm", norm, check_norm)}),
    Family("timm.layers.mlp", {"Mlp": Part("linear_quick_gelu", _mlp, _check_mlp)}),
    _others("layers.patch_embed", "PatchEmbed"),
    _others("layers.attention_pool", "AttentionPoolLatent"),
    _others("layers.drop", "DropPath"),
    _others("layers.activations", "QuickGELU"),
)
