"""The whole model in fp64: a reference computed by formula from the checkpoint's tensors.

It runs one sequence and one view at a time; nothing is packed, fused, paged or folded. `store` is
applied to every result that the model stores: rounding to 16 bits there and nowhere else shows the
error that a dtype causes even if everything else is exact.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.fp64 import attention, convolve, layer, logistic, rms, rope_axial, rope_half
from bench.inputs.presets import vision_of
from kernels.runtime.grids import Grid
from model.config import Config
from model.step3vl import Step3VL

Store = Callable[[Tensor], Tensor]


def rounding_to(dtype: torch.dtype) -> Store:
    """Rounds values to `dtype` and returns them in fp64."""
    return lambda x: x.to(dtype).double()


class Fp64Model:
    """A model's fp64 version, on the CPU, with the same weight values."""

    def __init__(self, model: Step3VL, store: Store = lambda x: x) -> None:
        self.config: Config = model.config
        self.weights = {n: x.cpu().double() for n, x in model.checkpoint_tensors().items()}
        self.store = store

    @torch.inference_mode()
    def logits(self, ids: Tensor, views: Sequence[Tensor] = ()) -> Tensor:
        """Logits [T, vocab] of ids, in which `views` replace the `<im_patch>` ids."""
        x = self.weights["model.embed_tokens.weight"][ids.cpu()]
        if views:
            x[ids.cpu() == self.config.tokens.im_patch] = self.features(views)
        for index in range(self.config.decoder.layers):
            x = self._decoder_layer(x, f"model.layers.{index}")
        head = self.weights["lm_head.weight"]
        return self.store(self._rms(x, "model.norm") @ head.T)

    @torch.inference_mode()
    def features(self, views: Sequence[Tensor]) -> Tensor:
        """Decoder embeddings [T', hidden] of views [3, height, width]."""
        return torch.cat([self._projected(*self._tower(view)) for view in views])

    @torch.inference_mode()
    def tokens(self, view: Tensor) -> Tensor:
        """The tower's output for a view, before downsampling: [rows * columns, width]."""
        return self._tower(view)[0]

    def _decoder_layer(self, x: Tensor, name: str) -> Tensor:
        decoder = self.config.decoder
        dim, positions = decoder.head_dim, torch.arange(len(x))
        inv_freq = torch.tensor(decoder.inverse_frequencies, dtype=torch.float64)
        h = self._rms(x, f"{name}.input_layernorm")
        q, k, v = (
            self._linear(h, f"{name}.self_attn.{part}_proj").unflatten(1, (-1, dim))
            for part in "qkv"
        )
        q = self.store(rope_half(self._rms(q, f"{name}.self_attn.q_norm"), positions, inv_freq))
        k = self.store(rope_half(self._rms(k, f"{name}.self_attn.k_norm"), positions, inv_freq))
        seen = positions <= positions[:, None]
        out = self.store(attention(q, k, v, decoder.attention_scale, seen)[0].flatten(1))
        x = self.store(x + self._linear(out, f"{name}.self_attn.o_proj"))
        h = self._rms(x, f"{name}.post_attention_layernorm")
        gate, up = (self._linear(h, f"{name}.mlp.{part}_proj") for part in ("gate", "up"))
        h = self.store(self.store(gate * logistic(gate)) * up)
        return self.store(x + self._linear(h, f"{name}.mlp.down_proj"))

    def _tower(self, view: Tensor) -> tuple[Tensor, Grid]:
        vision, weights = vision_of(self.config), self.weights
        pixels, kernel = view.cpu().double(), weights["vision_model.conv1.weight"]
        patches = F.conv2d(pixels[None], kernel, stride=vision.patch_size)[0]
        grid = (patches.shape[1], patches.shape[2])
        table = weights["vision_model.positional_embedding"].T.unflatten(1, (vision.grid,) * 2)
        table = F.interpolate(table[None], size=grid, mode="bilinear", align_corners=False)[0]
        x = self.store((self.store(patches) + self.store(table)).flatten(1).T)
        x = self._layer(x, "vision_model.ln_pre")
        for index in range(vision.layers):
            x = self._vision_block(x, grid, f"vision_model.transformer.resblocks.{index}")
        return x, grid

    def _vision_block(self, x: Tensor, grid: Grid, name: str) -> Tensor:
        vision, weights = vision_of(self.config), self.weights
        weight, bias = (weights[f"{name}.attn.in_proj_{kind}"] for kind in ("weight", "bias"))
        qkv = self.store(self._layer(x, f"{name}.ln_1") @ weight.T + bias)
        q, k, v = qkv.view(len(x), 3, vision.heads, -1).unbind(1)
        q, k = (self.store(rope_axial(part, grid, vision.rope_theta)) for part in (q, k))
        out = self.store(attention(q, k, v, q.shape[-1] ** -0.5)[0].flatten(1))
        x = self.store(
            x + self._linear(out, f"{name}.attn.out_proj") * weights[f"{name}.ls_1.gamma"]
        )
        h = self._linear(self._layer(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        h = self._linear(self.store(h * logistic(1.702 * h)), f"{name}.mlp.c_proj")
        return self.store(x + h * weights[f"{name}.ls_2.gamma"])

    def _projected(self, x: Tensor, grid: Grid) -> Tensor:
        image = x.T.unflatten(1, grid)
        for number in (1, 2):
            name = f"vision_model.vit_downsampler{number}"
            weight, bias = (self.weights[f"{name}.{kind}"] for kind in ("weight", "bias"))
            image = self.store(convolve(image, weight, bias))
        return self.store(image.flatten(1).T @ self.weights["vit_large_projector.weight"].T)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        bias = self.weights.get(f"{name}.bias")
        product = x @ self.weights[f"{name}.weight"].T
        return self.store(product if bias is None else product + bias)

    def _rms(self, x: Tensor, name: str) -> Tensor:
        return self.store(rms(x, self.weights[f"{name}.weight"], self.config.decoder.norm_eps))

    def _layer(self, x: Tensor, name: str) -> Tensor:
        weight, bias = (self.weights[f"{name}.{kind}"] for kind in ("weight", "bias"))
        return self.store(layer(x, weight, bias, vision_of(self.config).norm_eps))
