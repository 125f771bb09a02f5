"""Decoders of transformers with our ops, against the same model unpatched."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from model.hf import patch, unpatch
from model.hf.parts import is_plain
from tests.support.errors import max_error

pytestmark = pytest.mark.judge

OPS = ("qk_norm_rope", "rms_norm", "silu_mul")
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
IDS = torch.arange(22).view(2, 11) * 7 % 96


def qwen3(**options: object) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**SIZES | options))


def llama(**options: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES | options))


def qwen3_vl_text(**options: object) -> nn.Module:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    return Qwen3VLTextModel(Qwen3VLTextConfig(**SIZES | {"rope_parameters": rope} | options))


MODELS = {
    "qwen3": qwen3,
    "qwen3 yarn": lambda: qwen3(rope_parameters=YARN),
    "qwen3 bias": lambda: qwen3(attention_bias=True),
    "qwen3 window": lambda: qwen3(use_sliding_window=True, sliding_window=3, max_window_layers=1),
    "llama": llama,
    "llama bias": lambda: llama(attention_bias=True, mlp_bias=True),
    "qwen3_vl": qwen3_vl_text,
}
DISTINCT = ("qwen3", "llama", "qwen3_vl")


def loud(model: nn.Module) -> nn.Module:
    """The model with weights of every kind away from what they are initialised to."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    return model.eval()


@torch.inference_mode()
def outputs(model: nn.Module) -> Tensor:
    """Logits or hidden states of a batch: of a prompt, then of two more tokens with the cache."""
    positions = [torch.arange(9)[None], torch.arange(9, 11)[None]]
    if type(model).__name__ == "Qwen3VLTextModel":  # an image in the prompt: three axes differ
        positions = [each.expand(3, 2, -1).clone() for each in positions]
        positions[0][1, :, 3:7] = torch.tensor([3, 3, 4, 4])
        positions[0][2, :, 3:7] = torch.tensor([3, 4, 3, 4])
    first = model(IDS[:, :9], None, positions[0], use_cache=True)
    cache = first.get("cache", first.get("past_key_values"))  # by version
    second = model(IDS[:, 9:], None, positions[1], cache)
    return torch.cat([first[0], second[0]], dim=1)


@pytest.mark.parametrize(
    ("name", "impl"),
    [
        *((name, impl) for name in MODELS for impl in ("eager", "portable")),
        *(pytest.param(name, "triton", marks=pytest.mark.interpreter) for name in DISTINCT),
    ],
)
def test_fp32(name: str, impl: str):
    """Guards outputs of all ops together, of prompts and of decode steps; and `unpatch`."""
    model = loud(MODELS[name]())
    expected = outputs(model)
    assert patch(model, impl=impl).keys() == set(OPS)
    assert max_error(outputs(model), expected) < 2e-5
    unpatch(model)
    assert torch.equal(outputs(model), expected)
    assert not any("pacore" in key for module in model.modules() for key in vars(module))


@pytest.mark.parametrize(
    ("name", "impl"),
    [
        *((name, "portable") for name in DISTINCT),
        pytest.param("qwen3_vl", "triton", marks=pytest.mark.interpreter),
    ],
)
def test_bf16(name: str, impl: str):
    """Guards bf16: no further from the fp32 model than transformers' own bf16, RMS."""
    model = loud(MODELS[name]())
    narrow = deepcopy(model).bfloat16()
    with torch.no_grad():  # of the same, rounded, weights
        for wide, rounded in zip(model.parameters(), narrow.parameters(), strict=True):
            wide.copy_(rounded)
    exact = outputs(model)
    theirs = (outputs(narrow).float() - exact).square().mean().sqrt()
    patch(narrow, impl=impl)
    ours = (outputs(narrow).float() - exact).square().mean().sqrt()
    assert 0 < ours < 1.1 * theirs


@pytest.mark.parametrize("op", OPS)
def test_one_op(op: str):
    """Guards each op alone, and that it is called: halved results change the outputs."""
    model = loud(qwen3())
    expected = outputs(model)
    counts = patch(model, ops=[op], impl="portable")
    assert counts == {op: {"qk_norm_rope": 3, "rms_norm": 11, "silu_mul": 2}[op]}
    assert max_error(outputs(model), expected) < 2e-5
    with pytest.MonkeyPatch.context() as monkeypatch:
        from model.hf import text

        def halved(function: Callable) -> Callable:
            def call(*arguments: object, **options: object) -> object:
                result = function(*arguments, **options)
                return result / 2 if isinstance(result, Tensor) else [x / 2 for x in result]

            return call

        monkeypatch.setattr(text, op, halved(getattr(text, op)))
        assert max_error(outputs(model), expected) > 1e-2


def test_copy_has_its_own_weights():
    """Guards deepcopy: a copy's forward belongs to the copy."""
    model = loud(qwen3())
    patch(model)
    expected, copy = outputs(model), deepcopy(model)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(outputs(copy), expected)


def test_other_layers_in_place_of_linear():
    """Guards LoRA and quantised layers, which are called instead of read."""

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = loud(qwen3())
    for layer in model.model.layers:
        layer.self_attn.k_proj.__class__ = layer.mlp.up_proj.__class__ = Doubled
    expected = outputs(model)
    patch(model)
    assert max_error(outputs(model), expected) < 2e-5


def test_linear_layers_with_hooks_or_another_forward():
    """Guards what users attach to linear layers, which would otherwise be read, not called."""
    model = loud(qwen3())
    expected = outputs(model)
    hooked = model.model.layers[0].self_attn.q_proj
    hooked.register_forward_hook(lambda module, inputs, output: -output)
    replaced = model.model.layers[1].mlp.gate_proj
    replaced.forward = lambda x: x.new_zeros(*x.shape[:-1], replaced.out_features)
    changed = outputs(model)
    assert max_error(changed, expected) > 1e-2
    patch(model)
    assert max_error(outputs(model), changed) < 2e-5


def test_weights_of_another_class_are_not_plain():
    """Guards quantised weights, which keep the class of their layer."""

    class Quantised(nn.Parameter):
        pass

    layer = nn.Linear(2, 2)
    assert is_plain(layer)
    layer.weight = Quantised(layer.weight.data)
    assert not is_plain(layer)


def test_compiles_as_one_graph():
    """Guards torch.compile of a patched model: one operator per op and layer, same logits."""
    model = loud(qwen3()).requires_grad_(False)
    expected = model(IDS).logits
    patch(model)
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    logits = torch.compile(model, fullgraph=True, backend=backend)(IDS).logits
    assert max_error(logits, expected) < 2e-5
    assert sum("pacore.qk_norm_rope" in target for target in targets) == 2
    assert sum("pacore.add_rms_norm" in target for target in targets) == 2
    assert sum("pacore.rms_norm" in target for target in targets) == 3


def gelu() -> nn.Module:
    return llama(hidden_act="gelu")


def dynamic() -> nn.Module:
    return qwen3(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})


def hooked() -> nn.Module:
    model = qwen3()
    model.model.norm.forward = lambda x: x
    return model


def own_attention() -> nn.Module:
    model = qwen3()
    attention = model.model.layers[0].self_attn
    attention.__class__ = type("Mine", (type(attention),), {"__module__": "mine"})
    return model


def other_norm() -> nn.Module:
    model = qwen3()
    model.model.layers[1].post_attention_layernorm = nn.RMSNorm(64)
    return model


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            gelu,
            {},
            r"silu_mul does not fit LlamaMLP \(model.layers.0.mlp\): its activation GELU\w* is not",
        ),
        (dynamic, {}, r"Qwen3RotaryEmbedding \(model.rotary_emb\): rope_type 'dynamic' has freq"),
        (hooked, {}, r"rms_norm does not fit .*\(model.norm\): its forward was replaced already"),
        (own_attention, {}, r"Mine \(model.layers.0.self_attn\) is a subclass of Qwen3Attention"),
        (other_norm, {}, r"Qwen3DecoderLayer .*: its norm is RMSNorm, not Qwen3RMSNorm"),
        (mixtral, {}, r"MixtralForCausalLM is not known; .*docs/transformers.md"),
        (lambda: nn.Linear(2, 2), {}, "Linear has no module that we know"),
        (qwen3, {"ops": ["layer_norm"]}, "'layer_norm' applies nowhere .* qk_norm_rope, rms_norm"),
        (qwen3, {"impl": "cuda"}, "impl must be one of eager, portable, triton, not 'cuda'"),
    ],
)
def test_refusals(model: Callable[[], nn.Module], options: dict, message: str):
    """Guards the message, and that a refused model is not patched in part."""
    built = model()
    with pytest.raises(ValueError, match=message):
        patch(built, **options)
    assert not any("pacore_impl" in vars(module) for module in built.modules())


@pytest.mark.parametrize("op", OPS)
def test_gradients_are_refused(op: str):
    """Guards training of a patched model against gradients that are silently missing."""
    model = loud(qwen3())
    patch(model, ops=[op])
    with pytest.raises(ValueError, match=f"{op} has no backward, but an input"):
        model(IDS)


def test_half_a_patch_is_refused():
    """Guards attention that is patched without the rotary embedding above it."""
    model = loud(qwen3())
    patch(model.model.layers)
    with pytest.raises(ValueError, match="but not the model's rotary embedding; patch the whole"):
        outputs(model)
