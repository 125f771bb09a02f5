"""Contents of config.json files, and changes of them."""

# The keys of the published StepVL config.json, with the 10B's sizes.
STEP_VL = {
    "architectures": ["StepVLForConditionalGeneration"],
    "auto_map": {"AutoConfig": "configuration_step_vl.StepRoboticsConfig"},
    "model_type": "step_robotics",
    "im_end_token": "<im_end>",
    "im_patch_token": "<im_patch>",
    "im_start_token": "<im_start>",
    "image_token_len": 169,
    "patch_token_len": 81,
    "image_token_id": 151679,
    "understand_projector_stride": 2,
    "use_im_start_end": "true",
    "vision_select_layer": -1,
    "projector_bias": False,
    "vision_config": {
        "image_size": 728,
        "patch_size": 14,
        "width": 1536,
        "layers": 47,
        "heads": 16,
        "pool_type": "none",
        "output_dim": None,
        "use_cls_token": False,
        "ls_init_value": 0.1,
        "use_ln_post": False,
        "hidden_act": "quick_gelu",
    },
    "text_config": {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": [151643, 151645, 151679],
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 12288,
        "max_position_embeddings": 65536,
        "max_window_layers": 36,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0",
}
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 5e5,
    "eos_token_id": 7,
}


def merged(data, path, value):
    """`data` with `value` at the dotted `path`; a value of ... removes the key."""
    first, _, rest = path.partition(".")
    if rest:
        return data | {first: merged(data.get(first, {}), rest, value)}
    return {k: v for k, v in (data | {first: value}).items() if v is not ...}
