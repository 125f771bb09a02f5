"""transformers' decoders and Step3p7VisionModel with this model's weights: an independent judge.

Joined by the projector they are the whole model. With an `impl`, they compute with our ops in that
implementation (`model.hf.patch`). transformers is imported inside functions, because
the import takes seconds; where it is not installed they raise ImportError.
"""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from model.config import DecoderConfig
from model.hf import patch
from model.step3vl import Step3VL

RENAMED = {
    "conv1": "embeddings.patch_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "transformer.resblocks": "layers",
    "ln_pre": "pre_layernorm",
    "ln_1": "layernorm_before",
    "ln_2": "layernorm_after",
    "ls_1.gamma": "lambda_1",
    "ls_2.gamma": "lambda_2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "vit_downsampler": "downsampler",
}


def causal_lm(model: Step3VL, impl: str | None = None) -> Any:  # noqa: ANN401
    """Qwen3ForCausalLM, or without qk-norm LlamaForCausalLM, with our decoder's weights, in its
    dtype and on its device."""
    import transformers

    decoder = model.config.decoder
    name = "Qwen3" if decoder.qk_norm else "Llama"
    config = getattr(transformers, f"{name}Config")(
        vocab_size=decoder.vocab_size,
        hidden_size=decoder.hidden,
        num_hidden_layers=decoder.layers,
        num_attention_heads=decoder.heads,
        num_key_value_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        intermediate_size=decoder.mlp_width,
        rms_norm_eps=decoder.norm_eps,
        rope_parameters=rope_parameters(decoder),
        max_position_embeddings=decoder.max_positions,
        tie_word_embeddings=decoder.tied_embeddings,
    )
    judge = getattr(transformers, f"{name}ForCausalLM")(config)
    tensors = model.decoder.checkpoint_tensors()  # without the LM head if it is tied
    judge.load_state_dict(tensors | {"lm_head.weight": model.decoder.lm_head.weight})
    return like(model, judge, impl)


def rope_parameters(decoder: DecoderConfig) -> dict:
    """The rotation as transformers configures it."""
    scaling = decoder.rope_scaling
    kind = asdict(scaling) if scaling is not None else {"rope_type": "default"}
    return {"rope_theta": decoder.rope_theta, **kind}


def tower(model: Step3VL, impl: str | None = None) -> Any:  # noqa: ANN401
    """Step3p7VisionModel with our weights, Q and K rows permuted to its half-rotation layout."""
    from transformers.models.step3p7.configuration_step3p7 import Step3p7VisionConfig
    from transformers.models.step3p7.modeling_step3p7 import Step3p7VisionModel

    assert model.vision is not None
    vision = model.vision.config
    judge = Step3p7VisionModel(
        Step3p7VisionConfig(
            hidden_size=vision.width,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            mlp_ratio=vision.mlp_width / vision.width,
            patch_size=vision.patch_size,
            image_size=vision.image_size,
            max_position_embeddings=vision.grid**2,
            hidden_act="quick_gelu",
            layer_norm_eps=vision.norm_eps,
        )
    )
    heads, dim = vision.heads, vision.head_dim
    half_rotation = torch.cat([torch.arange(0, dim, 2), torch.arange(1, dim, 2)])
    state = {}
    for name, tensor in model.vision.checkpoint_tensors().items():
        name = name.removeprefix("vision_model.")
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        if ".attn.in_proj_" in name:
            prefix, kind = name.split(".attn.in_proj_")
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                if part != "v":
                    rows = rows.unflatten(0, (heads, dim))[:, half_rotation].flatten(0, 1)
                state[f"{prefix}.self_attn.{part}_proj.{kind}"] = rows
        elif name != "vit_large_projector.weight":
            state[name] = tensor
    judge.load_state_dict(state)
    return like(model, judge, impl)


def like(model: Step3VL, judge: nn.Module, impl: str | None) -> Any:  # noqa: ANN401
    """The judge on the model's device, with parameters in the model's dtype. Its buffers, the
    rotary frequencies, keep fp32, as they do when a checkpoint is loaded."""
    for parameter in judge.parameters():
        parameter.data = parameter.data.to(model.dtype)
    judge.to(model.device).eval()
    if impl is not None:
        patch(judge, impl=impl)
    return judge


@torch.inference_mode()
def logits(model: Step3VL, ids: Tensor, views: list[Tensor], impl: str | None = None) -> Tensor:
    """Logits [T, vocab] of ids, in which `views` replace the `<im_patch>` ids."""
    judge = causal_lm(model, impl)
    embeddings = judge.get_input_embeddings()(ids)
    if views:
        embeddings[ids == model.config.tokens.im_patch] = features(model, views, impl)
    return judge(inputs_embeds=embeddings[None]).logits[0]


@torch.inference_mode()
def features(model: Step3VL, views: list[Tensor], impl: str | None = None) -> Tensor:
    """Decoder embeddings [T', hidden] of views [3, height, width]."""
    assert model.vision is not None
    judge = tower(model, impl)
    tokens = [judge(view[None]).last_hidden_state.flatten(0, -2) for view in views]
    return torch.cat(tokens) @ model.vision.projector.T
