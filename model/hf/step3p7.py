"""The vision tower of transformers' Step3p7 with our ops: STEP3-VL's.

vision_attention    the rotation of q and k, and attention
layer_norm          all norms; the second one of a layer together with LayerScale and residual add
linear_quick_gelu   the first half of the feed-forward block
projector           the two convolutions, in Triton; the other forms are PyTorch's

The linear layer that follows the convolutions stays PyTorch's. Folding it into the second one, as
our own tower does, would leave out the second one's result, which is the tower's output.
"""

import torch
from torch import Tensor, nn

from kernels.gemm import convolution, halved
from kernels.runtime.dispatch import check, default_impl
from model.hf.parts import Family, Module, Part, impl_of, is_plain
from model.hf.vision import (
    Axial,
    attend,
    check_norm,
    check_quick_gelu,
    expand,
    norm,
    norm_of_sum,
)


def _rotary(self: Module, x: Tensor, position_ids: Tensor) -> Axial:
    """position_ids: int [rows * columns, 2]. Reading the last one waits for the GPU, as the tower
    did just before to compute them."""
    rows, columns = (position_ids[-1] + 1).tolist()
    return Axial((rows, columns), self.config.rope_parameters["rope_theta"])


def _attention(
    self: Module,
    hidden_states: Tensor,
    position_embeddings: Axial,
    attention_mask: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    check(attention_mask is None, "vision_attention: takes no attention_mask")
    qkv = _qkv(self, hidden_states.reshape(-1, self.embed_dim))
    out = attend(self, qkv, len(hidden_states), position_embeddings)
    return self.out_proj(out).view(hidden_states.shape), None


def _qkv(self: Module, x: Tensor) -> Tensor:
    """[T, 3 * H * D] with the order of elements that `vision_attention` rotates.

    Copying the rows of the weights in that order takes less traffic than copying the results as
    soon as T > H * D, gives one product instead of three, and leaves no second copy in memory.
    """
    layers = self.q_proj, self.k_proj, self.v_proj
    if all(map(is_plain, layers)):
        weights, biases = ([getattr(layer, of) for layer in layers] for of in ("weight", "bias"))
        return torch.addmm(_joined(self.num_heads, *biases), x, _joined(self.num_heads, *weights).T)
    # LoRA, quantised
    return _joined(self.num_heads, *(layer(x).T for layer in layers)).T.contiguous()


def _joined(heads: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rows of q, k and v, each [H * D, ...], as one tensor.

    The partner of row i of a head of q and k is row i + D / 2; here the two become adjacent.
    """
    halves = [rows.unflatten(0, (heads, 2, -1)).transpose(1, 2) for rows in (q, k)]
    return torch.cat([*halves, v.unflatten(0, (heads, -1, 2))]).flatten(0, 2)


def _layer(
    self: Module,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: object = None,
    **options: object,
) -> Tensor:
    h, _ = self.self_attn(
        hidden_states=self.layernorm_before(hidden_states),
        attention_mask=attention_mask,
        position_embeddings=position_embeddings,
        **options,
    )
    h, x = norm_of_sum(self.layernorm_after, h, hidden_states, self.lambda_1, impl_of(self))
    return torch.addcmul(x, self.lambda_2, self.mlp(h))


def _mlp(self: Module, hidden_states: Tensor) -> Tensor:
    return self.fc2(expand(self, hidden_states))


def _downsampler(self: Module, x: Tensor) -> Tensor:
    """x [N, C, rows, columns] is a view of packed tokens, and so is the result."""
    if (impl_of(self) or default_impl(x.device)) != "triton":
        return nn.Conv2d.forward(self, x)
    _to_channels_last(self)
    grids = [(x.shape[2], x.shape[3])] * len(x)
    tokens = x.permute(0, 2, 3, 1).flatten(0, 2)
    y = convolution(tokens, grids, self.weight, self.bias)
    return y.unflatten(0, (len(x), *halved(grids[:1])[0])).permute(0, 3, 1, 2)


def _to_channels_last(layer: Module) -> None:
    """Lay the weight out in memory as the kernel reads it, for good: a second copy of both weights
    would be as large as several layers. It keeps its shape and values."""
    if not layer.weight.is_contiguous(memory_format=torch.channels_last):
        with torch.inference_mode(False), torch.no_grad():
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)


def _check_layer(module: Module) -> None:
    check_norm(module.layernorm_after)


def _check_mlp(module: Module) -> None:
    check_quick_gelu(module.activation_fn)


def _check_downsampler(module: Module) -> None:
    check(type(module) is nn.Conv2d, f"it is {type(module).__name__}, not Conv2d")


PARTS = {
    "VisionRotaryEmbedding": Part("vision_attention", _rotary),
    "VisionAttention": Part("vision_attention", _attention),
    "VisionModel.pre_layernorm": Part("layer_norm", norm, check_norm),
    "VisionEncoderLayer.layernorm_before": Part("layer_norm", norm, check_norm),
    "VisionEncoderLayer": Part("layer_norm", _layer, _check_layer),
    "VisionMLP": Part("linear_quick_gelu", _mlp, _check_mlp),
    "VisionModel.downsampler1": Part("projector", _downsampler, _check_downsampler),
    "VisionModel.downsampler2": Part("projector", _downsampler, _check_downsampler),
}
FAMILIES = (
    Family(
        "transformers.models.step3p7.modeling_step3p7",
        {f"Step3p7{name}": part for name, part in PARTS.items()},
        frozenset({"Step3p7VisionModel", "Step3p7VisionEmbeddings"}),
    ),
)
