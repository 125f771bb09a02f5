"""Decoders of transformers with our ops: Qwen3, Llama, and the text model of Qwen3-VL.

rms_norm       the norms of hidden states, the second one of a layer together with the residual add
silu_mul       the feed-forward block's activation and product
qk_norm_rope   the norms of q and k, their rotation, and the layout that attention reads
"""

from torch import Tensor, nn

from kernels.activation import silu_mul
from kernels.norm import rms_norm
from model.hf.parts import Family, Part, impl_of, linear_into


def _norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    out = rms_norm(rows, self.weight, eps=self.variance_epsilon, impl=impl_of(self))
    return out.view(hidden_states.shape)


def _mlp(self: nn.Module, x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    width = self.config.intermediate_size
    gate_up = rows.new_empty(len(rows), 2 * width)
    linear_into(gate_up[:, :width], rows, self.gate_proj)
    linear_into(gate_up[:, width:], rows, self.up_proj)
    return self.down_proj(silu_mul(gate_up, impl=impl_of(self))).view(*x.shape[:-1], -1)


def _check_mlp(module: nn.Module) -> None:
    act = module.config.hidden_act
    if act != "silu":
        raise ValueError(f"hidden_act is {act!r}, not 'silu'")


def _family(name: str, prefix: str) -> Family:
    parts = {
        "RMSNorm": Part("rms_norm", _norm),
        "MLP": Part("silu_mul", _mlp, _check_mlp),
    }
    others = ("Attention", "DecoderLayer", "RotaryEmbedding", "Model", "ForCausalLM")
    return Family(
        f"transformers.models.{name}.modeling_{name}",
        {prefix + part: how for part, how in parts.items()},
        frozenset(prefix + other for other in others),
    )


FAMILIES = (_family("qwen3", "Qwen3"), _family("llama", "Llama"))
