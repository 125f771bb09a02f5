"""Rotary frequencies and their scaling, against transformers and exact arithmetic."""

import copy
from dataclasses import asdict, replace

import mpmath
import pytest
import torch

from bench.validate.transformers_judge import causal_lm, rope_parameters
from kernels.rotary_tables import cos_sin_table, rotary_frequencies
from model.config import STEP3_VL_10B, TINY, Config, DecoderConfig
from model.errors import InputError
from model.rope import Linear, Llama3, Yarn, parse_rope_scaling
from model.step3vl import Step3VL
from model.weights.random_init import random_init
from tests.support.errors import max_error

QWEN = {"factor": 4.0, "original_max_position_embeddings": 32768}  # its model card's
SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4},
    "llama3.1": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", **QWEN},
    "yarn, attention factor": {"rope_type": "yarn", **QWEN, "attention_factor": 1.0},
    "yarn, betas": {"rope_type": "yarn", **QWEN, "beta_fast": 16, "beta_slow": 2},
    "yarn, whole ramp": {"rope_type": "yarn", **QWEN, "truncate": False},
    "yarn, DeepSeek": {"rope_type": "yarn", **QWEN, "mscale": 0.7, "mscale_all_dim": 1.0},
    "yarn, short": {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 8},
}
LENGTHS = (2, 4096, 65536, 131072, 262144, 2**20)


def decoder_with(scaling: dict | None, base: DecoderConfig = STEP3_VL_10B.decoder) -> DecoderConfig:
    """`base` with a scaling as config.json describes it."""
    parsed = parse_rope_scaling(scaling, base.max_positions, "") if scaling else None
    return replace(base, rope_scaling=parsed)


@pytest.mark.judge
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("theta", [1e6, 1e4])
def test_frequencies_as_transformers(scaling: dict | None, theta: float):
    """Guards every formula: frequencies equal transformers' to fp32's precision, and so does the
    factor of attention."""
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    decoder = replace(decoder_with(scaling), rope_theta=theta)
    theirs = {"rope_type": "default", **copy.deepcopy(scaling or {})} | {"rope_theta": theta}
    judge = Qwen3RotaryEmbedding(Qwen3Config(head_dim=decoder.head_dim, rope_parameters=theirs))
    ours = torch.tensor(decoder.inverse_frequencies)
    torch.testing.assert_close(ours, judge.inv_freq, rtol=1e-6, atol=0)
    factor = decoder.attention_scale * decoder.head_dim**0.5
    assert factor == pytest.approx(judge.attention_scaling**2, rel=1e-12)


@pytest.mark.judge
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
def test_tables_are_exact(scaling: dict | None):
    """Guards the tables at every length: within half an ulp of exact cosines and sines, where
    transformers' fp32 angles are wrong by up to 1e-6 of themselves."""
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    decoder = decoder_with(scaling)
    inv_freq = decoder.inverse_frequencies
    positions = torch.tensor(LENGTHS) - 1
    cos, sin = cos_sin_table(rotary_frequencies(inv_freq), positions[:, None])
    with mpmath.workdps(40):
        exact = [
            [(mpmath.cos(p * mpmath.mpf(f)), mpmath.sin(p * mpmath.mpf(f))) for f in inv_freq]
            for p in positions.tolist()
        ]
        table = torch.tensor(
            [[[float(value) for value in pair] for pair in row] for row in exact],
            dtype=torch.float64,
        )
    ours = torch.stack((cos[:, 0], sin[:, 0]), dim=-1)
    assert (ours.double() - table).abs().max() < 2.0**-24
    config = Qwen3Config(head_dim=decoder.head_dim, rope_parameters=rope_parameters(decoder))
    judge = Qwen3RotaryEmbedding(config)
    theirs = torch.stack(judge(torch.zeros(()), positions[None]), dim=-1)[0, :, : len(inv_freq)]
    theirs = theirs.double() / judge.attention_scaling
    angle = positions.double()[:, None] * torch.tensor(inv_freq, dtype=torch.float64)
    assert ((theirs - table).abs() < (1e-6 * (1 + angle))[..., None]).all()


@pytest.mark.judge
@pytest.mark.parametrize("impl", ["eager", "portable"])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("scaling", [s for s in SCALINGS.values() if s], ids=list(SCALINGS)[1:])
def test_whole_models_as_transformers(scaling: dict, qk_norm: bool, impl: str):
    """Guards the path from the config to the scores, in a tiny model that reads four times its
    original length."""
    scaling = dict(scaling)
    if "original_max_position_embeddings" in scaling:
        scaling["original_max_position_embeddings"] = 40
    decoder = replace(decoder_with(scaling, TINY.decoder), rope_theta=500.0, qk_norm=qk_norm)
    model, plain = (
        Step3VL(Config("tiny", config, tokens=TINY.tokens), impl=impl)
        for config in (decoder, replace(decoder, rope_scaling=None))
    )
    for initialised in (model, plain):
        random_init(initialised.checkpoint_tensors(), seed=0)
    ids = torch.randint(0, 256, (160,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = causal_lm(model)(ids[None]).logits[0]
    assert max_error(model(ids), expected) < 1e-4
    assert max_error(plain(ids), expected) > 1e-3


def test_with_rope_scaling():
    """Guards the context that a scaling makes possible, and what it refuses."""
    yarn = {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.0}
    longer = STEP3_VL_10B.with_rope_scaling(yarn)
    assert longer.decoder.max_positions == 131072
    assert longer.decoder.rope_scaling == Yarn(2.0, 65536, 1.0)
    linear = STEP3_VL_10B.with_rope_scaling({"rope_type": "linear", "factor": 1.5})
    assert linear.decoder.rope_scaling == Linear(1.5) and linear.decoder.max_positions == 98304
    llama3 = STEP3_VL_10B.with_rope_scaling(SCALINGS["llama3.1"])
    assert llama3.decoder.rope_scaling == Llama3(8.0, 8192, 1.0, 4.0)
    assert llama3.decoder.max_positions == 65536  # 8 times 8,192
    short = {"type": "yarn", "factor": 2, "original_max_position_embeddings": 4096}
    short |= {"rope_theta": None, "rope_type": None}
    assert STEP3_VL_10B.with_rope_scaling(short).decoder.max_positions == 65536  # no less
    for config in (longer, linear, llama3):
        assert Config.from_dict(asdict(config)) == config
    for data, words in (
        ({"rope_type": "default"}, "rope_type is 'default'; it must be linear, llama3 or yarn"),
        ({"factor": 2.0}, "rope_scaling.rope_type is None; it must be linear, llama3 or yarn"),
        ({"rope_type": "longrope", "factor": 2}, "rope_type 'longrope' is not implemented"),
        ({"rope_type": "yarn", "factor": 300}, "makes 19,660,800 positions; at most 16,777,216"),
        ({"rope_type": "linear", "factor": 2, "rope_theta": 1e4}, "rope_theta is 10000.0, but"),
    ):
        with pytest.raises(InputError, match=words):
            STEP3_VL_10B.with_rope_scaling(data)
    with pytest.raises(InputError, match="has rope scaling already .yarn, factor 2.; change its"):
        longer.with_rope_scaling(yarn)
