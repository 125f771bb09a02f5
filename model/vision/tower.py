"""The vision encoder: PE-lang tower and the projector, which reduces the tokens 16-fold.

Views of all sizes run as one packed batch, with equal grids adjacent: a linear layer processes all
tokens of all views at once, attention and convolutions process each view separately.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import onednn
from kernels.linear_quick_gelu import linear_quick_gelu
from kernels.norm import layer_norm
from kernels.projector import fold, output_tokens, projector
from kernels.runtime.dispatch import check
from kernels.runtime.grids import Grid, tokens_of
from kernels.runtime.lru import Lru
from kernels.runtime.spans import span, spanned
from kernels.runtime.tensor_cache import pinned
from kernels.vision_attention import vision_attention
from model.config import VisionConfig
from model.modules import ModuleList
from model.vision.cache import ImageCache
from model.vision.graph import Graphs


class VisionTower(nn.Module):
    """Patch embedding, position embedding, ln_pre, blocks, two downsamplers and the projector.

    The tensors that `prepare` derives from the weights, `cache` (used by `Step3VL`) and `graphs`
    are not parameters and are in no checkpoint. After changing weights in place, call `prepare`.
    """

    def __init__(
        self,
        config: VisionConfig,
        out_width: int,
        *,
        impl: dict[str, str | None],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.config, self.impl = config, impl

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

        def kernel(*shape: int) -> nn.Parameter:
            # Channels-last, which is the layout of the tokens.
            tensor = weight(*shape).data.to(memory_format=torch.channels_last)
            return nn.Parameter(tensor, requires_grad=False)

        c = config.width
        self.patch_embedding = weight(c, 3, config.patch_size, config.patch_size)
        self.positional_embedding = weight(config.grid**2, c)
        self.ln_pre = _LayerNorm(c, weight)
        blocks = (_Block(config, weight) for _ in range(config.layers))
        self.blocks: ModuleList[_Block] = ModuleList(blocks)
        self.downsampler1, self.bias1 = kernel(2 * c, c, 3, 3), weight(2 * c)
        self.downsampler2, self.bias2 = kernel(4 * c, 2 * c, 3, 3), weight(4 * c)
        self.projector = weight(out_width, 4 * c)
        self.cache, self.graphs = ImageCache(), Graphs()
        self._interpolated = Lru(16)  # grid -> position embedding
        self._folded: tuple[Tensor, Tensor] | None = None

    def prepare(self) -> None:
        """Compute what each call derives from the weights; drop everything derived from older ones.

        The first call of `forward` does this if it has not been done.
        """
        self._forget()
        self._folded = fold(self.downsampler2, self.bias2, self.projector)

    @torch.inference_mode()
    def forward(self, views: Sequence[Tensor], between: Callable[[], None] | None = None) -> Tensor:
        """Encode views [3, height, width] of any sizes to decoder embeddings [T', out_width].

        The result has each view's tokens in the order of the views, row-major within a view.
        `between` is called after each block has been launched, where the caller may pause; the
        tower then runs without a CUDA graph. Raises ValueError for views that `grids` refuses.
        """
        if self._folded is None:
            self.prepare()
        view_grids = self.grids(views)
        if not view_grids:
            return self.projector.new_empty(0, len(self.projector))
        order, out, rows = _equal_grids_adjacent(view_grids), None, None
        if order != sorted(order):
            counts = [output_tokens(grid) for grid in view_grids]
            out = self.projector.new_empty(sum(counts), len(self.projector))
            view_rows = torch.arange(len(out), device=out.device).split(counts)
            rows = torch.cat([view_rows[index] for index in order])
        views, grids = [views[i] for i in order], tuple(view_grids[i] for i in order)
        patches = spanned("vision pack", self.patches)(views, grids)
        impls = self.impl.values()
        body = partial(self.encode, grids=grids)
        graph = None if between else self.graphs.find((grids, *impls), body, patches, impls)
        if graph is None:
            return self.encode(patches, grids, out, rows, between)
        features = graph(patches)
        if out is None or rows is None:
            return features.clone()
        return out.index_copy_(0, rows, features)

    def grids(self, views: Sequence[Tensor]) -> list[Grid]:
        """Each view's patches as rows x columns.

        Raises ValueError unless all views are [3, height, width] in whole patches, no side has more
        patches than the global view's, and all have one dtype and device.
        """
        size, side, grids = self.config.patch_size, self.config.grid, []
        for i, view in enumerate(views):
            shape, dtype_and_device = list(view.shape), (view.dtype, view.device)
            first = (views[0].dtype, views[0].device)
            check(
                len(shape) == 3 and shape[0] == 3,
                f"view {i} has shape {shape}; it must be [3, height, width]",
            )
            check(
                dtype_and_device == first,
                f"view {i} is {view.dtype} on {view.device},"
                f" but view 0 is {first[0]} on {first[1]}",
            )
            (rows, row), (columns, column) = (divmod(pixels, size) for pixels in shape[1:])
            check(
                row == column == 0,
                f"view {i} has {shape[1]} x {shape[2]} pixels; sides must be multiples of {size}",
            )
            check(
                0 < rows <= side and 0 < columns <= side,
                f"view {i} has {rows} x {columns} patches; sides must have 1 to {side}",
            )
            grids.append((rows, columns))
        return grids

    def count(self, views: Sequence[Tensor]) -> int:
        """Number of decoder embeddings of views. Raises ValueError as `grids` does."""
        return sum(map(output_tokens, self.grids(views)))

    def patches(self, views: Sequence[Tensor], grids: Sequence[Grid]) -> Tensor:
        """Pixels of all views, packed by patch: [T, 3 * size * size] in the weights' dtype."""
        weight, size = self.patch_embedding, self.config.patch_size
        packed = weight.new_empty(tokens_of(grids), weight[0].numel())
        parts = packed.split([rows * columns for rows, columns in grids])
        for view, part, (rows, columns) in zip(views, parts, grids, strict=True):
            pixels = view.to(weight.device).unflatten(2, (columns, size)).unflatten(1, (rows, size))
            part.view(rows, columns, 3, size, size).copy_(pixels.permute(1, 3, 0, 2, 4))
        return packed

    def encode(
        self,
        patches: Tensor,
        grids: Sequence[Grid],
        out: Tensor | None = None,
        rows: Tensor | None = None,
        between: Callable[[], None] | None = None,
    ) -> Tensor:
        """Tower and projector on packed patches; `out` and `rows` as in `kernels.projector`,
        `between` as in `forward`."""
        return projector(
            self.tower(patches, grids, between),
            grids,
            self.downsampler1,
            self.bias1,
            self.downsampler2,
            self.bias2,
            self.projector,
            folded=self._folded,
            out=out,
            rows=rows,
            impl=self.impl["projector"],
        )

    def tower(
        self,
        patches: Tensor,
        grids: Sequence[Grid],
        between: Callable[[], None] | None = None,
    ) -> Tensor:
        """Embedding, ln_pre and the blocks on packed patches: [T, width].

        Each sub-layer's LayerScale and residual sum are folded into the next layer norm.
        """
        x = self._norm(self._embedded(patches, grids), self.ln_pre)
        last: tuple[Tensor, Tensor] | None = None  # a sub-layer's result and its LayerScale
        for index, block in enumerate(self.blocks):
            with span("vision layer", index):
                if last is None:
                    h = self._norm(x, block.ln_1)
                else:
                    h, x = self._norm_of_sum(x, *last, block.ln_1)
                h, x = self._norm_of_sum(
                    x, self._attention(h, block, grids), block.ls_1, block.ln_2
                )
                last = self._mlp(h, block), block.ls_2
            if between:
                between()
        assert last is not None, "the tower has no blocks; VisionConfig.layers must be at least 1"
        branch, gamma = last
        return x + branch * gamma

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Published name -> this module's storage."""
        tensors: dict[str, Tensor] = {
            "vision_model.conv1.weight": self.patch_embedding,
            "vision_model.positional_embedding": self.positional_embedding,
            "vision_model.ln_pre.weight": self.ln_pre.weight,
            "vision_model.ln_pre.bias": self.ln_pre.bias,
        }
        for index, block in enumerate(self.blocks):
            for name, tensor in block.checkpoint_tensors():
                tensors[f"vision_model.transformer.resblocks.{index}.{name}"] = tensor
        return tensors | {
            "vision_model.vit_downsampler1.weight": self.downsampler1,
            "vision_model.vit_downsampler1.bias": self.bias1,
            "vision_model.vit_downsampler2.weight": self.downsampler2,
            "vision_model.vit_downsampler2.bias": self.bias2,
            "vit_large_projector.weight": self.projector,
        }

    def _norm(self, x: Tensor, norm: "_LayerNorm") -> Tensor:
        eps, impl = self.config.norm_eps, self.impl["layer_norm"]
        return layer_norm(x, norm.weight, norm.bias, eps=eps, impl=impl)

    def _norm_of_sum(
        self, x: Tensor, branch: Tensor, gamma: Tensor, norm: "_LayerNorm"
    ) -> tuple[Tensor, Tensor]:
        """x + gamma * branch: normalised, and not normalised."""
        return layer_norm(
            branch,
            norm.weight,
            norm.bias,
            eps=self.config.norm_eps,
            residual=x,
            gamma=gamma,
            impl=self.impl["layer_norm"],
        )

    def _linear(self, name: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        linear = F.linear if self.impl["linear"] == "eager" else onednn.linear
        return spanned(f"linear vision {name}", linear)(x, weight, bias)

    def _attention(self, h: Tensor, block: "_Block", grids: Sequence[Grid]) -> Tensor:
        out = vision_attention(
            self._linear("qkv", h, block.qkv, block.qkv_bias),
            grids,
            heads=self.config.heads,
            theta=self.config.rope_theta,
            impl=self.impl["vision_attention"],
        )
        return self._linear("out", out, block.out, block.out_bias)

    def _mlp(self, h: Tensor, block: "_Block") -> Tensor:
        h = linear_quick_gelu(h, block.fc, block.fc_bias, impl=self.impl["linear_quick_gelu"])
        return self._linear("proj", h, block.proj, block.proj_bias)

    def _embedded(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Patch embedding, a matrix product since the convolution's stride is a patch, plus the
        position embedding."""
        weight = self.patch_embedding.flatten(1)
        x = self._linear("patches", patches, weight)
        start = 0
        for grid, same in groupby(grids):
            positions, n = self._positions(grid), len(list(same))
            end = start + n * len(positions)
            x[start:end].view(n, *positions.shape).add_(positions)
            start = end
        return x

    def _positions(self, grid: Grid) -> Tensor:
        """The position embedding for a view's grid, [tokens, width], in the parameter's dtype."""
        if grid == (self.config.grid, self.config.grid):
            return self.positional_embedding
        return pinned((id(self), grid), partial(self._interpolate, grid))

    def _interpolate(self, grid: Grid) -> Tensor:
        positions = self._interpolated.get(grid)
        if positions is None:
            side = self.config.grid
            table = self.positional_embedding.view(1, side, side, -1).permute(0, 3, 1, 2)
            table = F.interpolate(table, size=grid, mode="bilinear", align_corners=False)
            positions = table.flatten(2)[0].T.contiguous()
            self._interpolated.put(grid, positions)
        return positions

    def _forget(self) -> None:
        self._folded = None
        self._interpolated.clear()
        self.graphs.clear()
        self.cache.clear()

    def _apply(self, *args: Any, **options: Any) -> "VisionTower":
        """Called for every change of device or dtype: drop everything derived from weights."""
        self._forget()
        return super()._apply(*args, **options)


def _equal_grids_adjacent(grids: Sequence[Grid]) -> list[int]:
    """Indices that make equal grids adjacent, otherwise in order."""
    first = {grid: index for index, grid in reversed(list(enumerate(grids)))}
    return sorted(range(len(grids)), key=lambda index: first[grids[index]])


class _LayerNorm(nn.Module):
    def __init__(self, width: int, weight: Callable[..., nn.Parameter]) -> None:
        super().__init__()
        self.weight, self.bias = weight(width), weight(width)


class _Block(nn.Module):
    """The weights of one block of the tower."""

    def __init__(self, config: VisionConfig, weight: Callable[..., nn.Parameter]) -> None:
        super().__init__()
        c, hidden = config.width, config.mlp_width
        self.ln_1, self.ln_2 = _LayerNorm(c, weight), _LayerNorm(c, weight)
        self.qkv, self.qkv_bias = weight(3 * c, c), weight(3 * c)
        self.out, self.out_bias = weight(c, c), weight(c)
        self.fc, self.fc_bias = weight(hidden, c), weight(hidden)
        self.proj, self.proj_bias = weight(c, hidden), weight(c)
        self.ls_1, self.ls_2 = weight(c), weight(c)

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "attn.in_proj_weight", self.qkv
        yield "attn.in_proj_bias", self.qkv_bias
        yield "attn.out_proj.weight", self.out
        yield "attn.out_proj.bias", self.out_bias
        for name, norm in (("ln_1", self.ln_1), ("ln_2", self.ln_2)):
            yield f"{name}.weight", norm.weight
            yield f"{name}.bias", norm.bias
        yield "mlp.c_fc.weight", self.fc
        yield "mlp.c_fc.bias", self.fc_bias
        yield "mlp.c_proj.weight", self.proj
        yield "mlp.c_proj.bias", self.proj_bias
        yield "ls_1.gamma", self.ls_1
        yield "ls_2.gamma", self.ls_2
