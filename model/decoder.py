"""The decoder: Qwen3 (with qk-norm) or Llama (without), over paged KV.

One forward serves prefill, chunked prefill, decode and their mixtures: a step is a batch of tokens,
each with a position and a KV slot to write, and a prefix plan that says what each row attends to.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels.torch_ops  # noqa: F401 - registers the ops for torch.compile and torch.export
from kernels.activation import gate_and_up, silu_mul
from kernels.kv_pages import KVPages
from kernels.norm import rms_norm
from kernels.plan_node import PlanNode
from kernels.prefix_attention.advance import advance
from kernels.prefix_plan import PrefixPlan
from kernels.rotary_attention import rotary_attention
from kernels.rotary_tables import RotaryTables, rotary_frequencies
from kernels.runtime.arithmetic import cdiv
from kernels.runtime.dispatch import default_impl
from kernels.runtime.spans import span, spanned
from model.config import DecoderConfig
from model.kv_cache import KVCache
from model.modules import Linear, ModuleList


@dataclass(frozen=True)
class Step:
    """A step's positions, KV slots and prefix plan: T rows in the plan's depth-first order."""

    positions: Tensor  # int [T] index in the sequence, for the rotation
    slots: Tensor  # int [T] where the row's K and V are written: page * page_size + offset
    plan: PrefixPlan  # in code that is exported its `PlanTensors`

    @staticmethod
    def of_sequence(start: int, length: int, cache: KVCache) -> "Step":
        """The step that appends `length` tokens to a sequence of `start` tokens.

        The sequence has the cache's first pages, in order.
        """
        end, device = start + length, cache.k.device
        positions = torch.arange(start, end, device=device)
        node = PlanNode(range(cdiv(end, cache.page_size)), end, 0, length, num_new=length)
        plan = PrefixPlan.build(
            [node],
            num_rows=length,
            num_pages=cache.num_pages,
            page_size=cache.page_size,
            device=device,
        )
        return Step(positions, positions, plan)

    def advance(self) -> None:
        """Turn a decode step into the next one, in place and on the device (`advance`)."""
        advance(self.plan, self.positions, self.slots)


class Decoder(nn.Module):
    """Embedding, layers, final norm and LM head. Q/K/V and gate/up weights are stored fused.

    interleaved_gate_up: whether rows of the gate and the up projection alternate in `gate_up`,
        so that a tile of the product holds whole pairs; if not, up follows gate
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        impl: dict[str, str | None],
        device: torch.device | str,
        dtype: torch.dtype,
        interleaved_gate_up: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.impl = config, impl
        self.interleaved_gate_up = interleaved_gate_up

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

        self.embed_tokens = weight(config.vocab_size, config.hidden)
        layers = (_Layer(config, weight) for _ in range(config.layers))
        self.layers: ModuleList[_Layer] = ModuleList(layers)
        self.norm = weight(config.hidden)
        tied = config.tied_embeddings
        self.lm_head = Linear(
            self.embed_tokens if tied else weight(config.vocab_size, config.hidden)
        )
        self.frequencies: Tensor
        frequencies = rotary_frequencies(config.inverse_frequencies)
        self.register_buffer("frequencies", frequencies.to(device), persistent=False)

    def forward(self, embeddings: Tensor, step: Step, cache: KVCache) -> Tensor:
        """Final hidden states [T, hidden] of embeddings [T, hidden]; writes KV to `cache`."""
        eps, impl, linear = self.config.norm_eps, self.impl["rms_norm"], self.impl["linear"]
        residual = embeddings
        norms = [*(layer.input_norm for layer in self.layers), self.norm]
        h = rms_norm(embeddings, norms[0], eps=eps, impl=impl)
        tables = None  # for the compiler: what is stored would depend on the slots' values
        traced = torch.compiler.is_compiling()
        if not traced and (self.impl["qk_norm_rope"] or default_impl(h.device)) == "portable":
            tables = RotaryTables.of(
                self.frequencies, step.positions[:, None], step.slots, cache.layer(0)
            )
        for index, layer in enumerate(self.layers):
            with span("decoder layer", index):
                h = self._attention(h, layer, step, cache.layer(index), tables)
                h, residual = rms_norm(h, layer.post_norm, eps=eps, residual=residual, impl=impl)
                # Gate and up have no name: it would hold them until those of the next layer exist.
                h = silu_mul(
                    spanned("linear gate_up", layer.gate_up)(h, linear),
                    interleaved=self.interleaved_gate_up,
                    impl=self.impl["silu_mul"],
                )
                h = spanned("linear down", layer.down)(h, linear)
                next_norm = norms[index + 1]
                h, residual = rms_norm(h, next_norm, eps=eps, residual=residual, impl=impl)
        return h

    def embed(self, input_ids: Tensor, images: Iterable[tuple[Tensor, Tensor]] = ()) -> Tensor:
        """Embeddings [T, hidden] of ids, int [T].

        images: pairs of rows, int64 [n], and features [n, hidden] that replace those rows
        """
        embeddings = spanned("embed", F.embedding)(input_ids, self.embed_tokens)
        for rows, features in images:
            embeddings.index_copy_(0, rows, features)
        return embeddings

    def logits(self, hidden: Tensor) -> Tensor:
        """LM head on final hidden states [T, hidden]: [T, vocab]."""
        return spanned("linear lm_head", self.lm_head)(hidden, self.impl["linear"])

    def pack(self) -> None:
        """Hold the weights packed where the linear layers compute with packed ones (`Linear`)."""
        for linear in self._linears():
            # The embedding needs its plain weight.
            if linear.packs(self.impl["linear"]) and linear.weight is not self.embed_tokens:
                linear.pack()

    def unpack(self) -> None:
        """Hold the weights only plain, as torch.compile and torch.export need them."""
        for linear in self._linears():
            linear.unpack()

    def is_packed(self) -> bool:
        """Whether any weight is held packed only."""
        return any(linear.weight.is_mkldnn for linear in self._linears())

    def _linears(self) -> Iterator[Linear]:
        return (module for module in self.modules() if isinstance(module, Linear))

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Published name -> view into this module's storage, until the next `pack`.

        Unpacks the weights, which are then held packed as well if the model runs.
        """
        self.unpack()
        tensors: dict[str, Tensor] = {"model.embed_tokens.weight": self.embed_tokens}
        for index, layer in enumerate(self.layers):
            for name, tensor in layer.checkpoint_tensors(self.config, self.interleaved_gate_up):
                tensors[f"model.layers.{index}.{name}.weight"] = tensor
        tensors["model.norm.weight"] = self.norm
        if not self.config.tied_embeddings:
            tensors["lm_head.weight"] = self.lm_head.weight
        return tensors

    def _attention(
        self,
        h: Tensor,
        layer: "_Layer",
        step: Step,
        pages: KVPages,
        tables: RotaryTables | None,
    ) -> Tensor:
        linear = self.impl["linear"]
        out = rotary_attention(
            spanned("linear qkv", layer.qkv)(h, linear),
            layer.q_norm,
            layer.k_norm,
            self.frequencies,
            step.positions,
            step.slots,
            pages,
            step.plan,
            scale=self.config.attention_scale,
            eps=self.config.norm_eps,
            tables=tables,
            impl=(self.impl["qk_norm_rope"], self.impl["prefix_attention"]),
        )
        return spanned("linear o", layer.o)(out.flatten(1), linear)


class _Layer(nn.Module):
    """The weights of one decoder layer."""

    def __init__(self, config: DecoderConfig, weight: Callable[..., nn.Parameter]) -> None:
        super().__init__()
        q_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.input_norm = weight(config.hidden)
        self.qkv = Linear(weight(q_width + 2 * kv_width, config.hidden))
        self.q_norm = weight(config.head_dim) if config.qk_norm else None
        self.k_norm = weight(config.head_dim) if config.qk_norm else None
        self.o = Linear(weight(config.hidden, q_width))
        self.post_norm = weight(config.hidden)
        self.gate_up = Linear(weight(2 * config.mlp_width, config.hidden))
        self.down = Linear(weight(config.hidden, config.mlp_width))

    def checkpoint_tensors(
        self, config: DecoderConfig, interleaved_gate_up: bool
    ) -> Iterator[tuple[str, Tensor]]:
        q_width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        q, k, v = self.qkv.weight.split([q_width, kv_width, kv_width])
        gate, up = gate_and_up(self.gate_up.weight, interleaved_gate_up, axis=0)
        yield "input_layernorm", self.input_norm
        yield "self_attn.q_proj", q
        yield "self_attn.k_proj", k
        yield "self_attn.v_proj", v
        if self.q_norm is not None and self.k_norm is not None:
            yield "self_attn.q_norm", self.q_norm
            yield "self_attn.k_norm", self.k_norm
        yield "self_attn.o_proj", self.o.weight
        yield "post_attention_layernorm", self.post_norm
        yield "mlp.gate_proj", gate
        yield "mlp.up_proj", up
        yield "mlp.down_proj", self.down.weight
