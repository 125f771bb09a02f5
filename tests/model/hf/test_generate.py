"""`generate` over shared pages: the tokens and logits of transformers' own."""

from copy import deepcopy
from typing import Any

import pytest
import torch

from kernels.prefix_attention import op
from kernels.runtime.configs import Gpu, assume_gpu, use_config
from model.hf import generate, patch
from model.hf.paged_attention import NAME, register
from tests.support.errors import max_error

pytestmark = pytest.mark.judge

NEW = 70  # more than a page
SAMPLED = {"do_sample": True, "temperature": 0.8, "num_return_sequences": 3}
RECORDED = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}


SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.3,  # attention matters, and so does each token
}


def causal_lm(family: str, **options: object) -> Any:
    import transformers

    options = {**SIZES, "eos_token_id": None, "pad_token_id": 0, **options}
    config = getattr(transformers, f"{family}Config")(**options)
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@pytest.fixture(scope="module")
def llama() -> Any:
    return causal_lm("Llama")


@pytest.fixture(scope="module")
def qwen3() -> Any:
    return causal_lm("Qwen3")


@pytest.fixture
def model(request) -> Any:
    return request.getfixturevalue(request.param)


def prompts(count: int, length: int) -> torch.Tensor:
    return torch.randint(1, 97, (count, length), generator=torch.Generator().manual_seed(length))


def both(model: Any, ids: torch.Tensor, impl: str | None = None, **options: object) -> list:
    """What stock generate and ours return, with the same random numbers."""
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, **options}
    outputs = []
    for run in (model.generate, lambda ids, **options: generate(model, ids, impl=impl, **options)):
        torch.manual_seed(7)
        outputs.append(run(ids, **options))
    return outputs


@pytest.mark.parametrize("model", ["llama", "qwen3"], indirect=True)
@pytest.mark.parametrize("impl", [None, "eager"])
@pytest.mark.parametrize(("count", "length"), [(1, 70), (2, 65), (2, 64), (2, 2), (2, 1)])
def test_sampling(monkeypatch, model: Any, impl: str | None, count: int, length: int):
    """Guards each row's logits and tokens over three pages: the last token read twice or not at
    all, rows of another prompt, and prompts that end with a page or have nothing to share."""
    if impl == "eager":  # not another form
        monkeypatch.setattr(op, "prefix_attention_portable", None)
    stock, ours = both(model, prompts(count, length), impl, **SAMPLED, **RECORDED)
    assert ours.sequences.shape == (3 * count, length + NEW)
    for name in ("logits", "scores"):
        for one, other in zip(getattr(ours, name), getattr(stock, name), strict=True):
            assert max_error(one, other) < 1e-4
    assert torch.equal(ours.sequences, stock.sequences)
    assert len({tuple(row) for row in ours.sequences.tolist()}) == 3 * count


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"eos_token_id": [3, 5, 8, 13]},
        {"max_new_tokens": 1},
        {"num_return_sequences": 1},
        {"do_sample": False, "num_return_sequences": 1, "temperature": None},
        {"repetition_penalty": 1.3, "top_p": 0.9},
    ],
    ids=lambda options: " ".join(options),
)
def test_options(llama: Any, options: dict):
    """Guards rows that end early, and processors that see the prompt."""
    stock, ours = both(llama, prompts(2, 20), **{**SAMPLED, **options})
    assert torch.equal(ours, stock)
    if "eos_token_id" in options:
        ends = (ours == 0).sum(dim=1)  # padding after each row's end
        assert len(set(ends.tolist())) > 2


def test_stopping_criteria_and_config(llama: Any):
    """Guards criteria, which see whole sequences, and settings that come in a GenerationConfig."""
    from transformers import GenerationConfig, StoppingCriteriaList

    def at_27(ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        return torch.full((len(ids),), ids.shape[1] >= 27)

    config = GenerationConfig(do_sample=True, num_return_sequences=4, pad_token_id=0, top_k=0)
    options = {"generation_config": config, "stopping_criteria": StoppingCriteriaList([at_27])}
    stock, ours = both(llama, prompts(1, 20), **options)
    assert ours.shape == (4, 27)
    assert torch.equal(ours, stock)


def test_the_prompt_is_computed_once(llama: Any):
    """Guards what this is for: no rows of the prompt but one copy, and no copies of its KV."""
    rows = []
    hook = llama.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: rows.append((args or (kwargs["hidden_states"],))[0].shape[:2]),
        with_kwargs=True,
    )
    out = generate(
        llama, prompts(1, 200), **SAMPLED, max_new_tokens=3, return_dict_in_generate=True
    )
    hook.remove()
    assert rows == [(1, 199), (3, 1), (3, 1), (3, 1)]
    cache = out.get("cache", out.get("past_key_values"))
    assert cache.pages(0).num_pages == 4 + 3
    assert cache.get_seq_length() == 202


def test_sliding_window():
    """Guards layers that see only the last tokens, across the prompt's end."""
    model = causal_lm(
        "Qwen3",
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    stock, ours = both(model, prompts(1, 20), **SAMPLED, **RECORDED, max_new_tokens=12)
    for one, other in zip(ours.logits, stock.logits, strict=True):
        assert max_error(one, other) < 1e-4
    model.config.sliding_window = 100  # has an effect, else this test shows nothing
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 100
    wide, _ = both(model, prompts(1, 20), **SAMPLED, **RECORDED, max_new_tokens=12)
    assert max_error(wide.logits[0], stock.logits[0]) > 1e-2


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Qwen3 windows"])
def test_patched(family: str):
    """Guards patched layers, which write K and V straight to the pages."""
    windows = {
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    name, *more = family.split()
    model = causal_lm(name, **(windows if more else {}))
    ids = prompts(2, 20)
    stock, _ = both(model, ids, **SAMPLED, **RECORDED)
    assert "qk_norm_rope" in patch(model)
    with pytest.MonkeyPatch.context() as monkeypatch:
        # Stock attention over pages would be right, too.
        monkeypatch.setattr("model.hf.paged_attention.prefix_attention", None)
        torch.manual_seed(7)
        ours = generate(model, ids, **SAMPLED, **RECORDED, max_new_tokens=NEW)
    for one, other in zip(ours.logits, stock.logits, strict=True):
        assert max_error(one, other) < 1e-4
    assert torch.equal(ours.sequences, stock.sequences)


def test_patched_with_three_axes():
    """Guards Qwen3-VL's text model, whose rotation `rotary_attention` does not have."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    small = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1}
    config = Qwen3VLConfig(
        text_config={**SIZES, "rope_parameters": rope},
        vision_config={**small, "out_hidden_size": 32, "deepstack_visual_indexes": [0]},
    )
    model: Any = Qwen3VLForConditionalGeneration(config).eval()
    stock, ours = both(model, prompts(1, 9), **SAMPLED, **RECORDED, max_new_tokens=5)
    patch(model.model.language_model)
    model.model.rope_deltas = torch.tensor([[-3]])  # left by an earlier call with an image
    torch.manual_seed(7)
    patched = generate(model, prompts(1, 9), **SAMPLED, **RECORDED, max_new_tokens=5)
    for outputs in (ours, patched):
        for one, other in zip(outputs.logits, stock.logits, strict=True):
            assert max_error(one, other) < 1e-4
        assert torch.equal(outputs.sequences, stock.sequences)


@torch.no_grad()
def test_patched_refuses_another_attention(llama: Any):
    """Guards patched layers, which would attend to pages whatever the model is set to, and masks
    and dropout, which pages do not have."""
    from model.hf.paged_cache import PagedCache

    model = deepcopy(llama)
    patch(model)
    with pytest.raises(ValueError, match="a PagedCache needs attention 'pacore_paged', not 'sdpa'"):
        model(prompts(1, 4), None, None, PagedCache(model.config))
    register()
    model.set_attn_implementation(NAME)
    with pytest.raises(ValueError, match="only causal masks are supported, without padding"):
        model(prompts(2, 5), torch.zeros(2, 1, 5, 5), None, PagedCache(model.config))
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="dropout is not supported"):
        model.train()(prompts(2, 5), None, None, PagedCache(model.config))


def test_bf16(llama: Any):
    """Guards pages of another dtype than the model's."""
    model = causal_lm("Llama").to(torch.bfloat16)
    stock, ours = both(model, prompts(1, 20), **SAMPLED, **RECORDED, max_new_tokens=1)
    assert max_error(ours.logits[0], stock.logits[0]) < 0.05
    pages = (ours.get("cache") or ours.past_key_values).pages(0)
    assert pages.k.dtype == torch.bfloat16


@pytest.mark.usefixtures("interpreter")
def test_triton():
    """Guards the Triton form, whose schedule advances with the plan."""
    model = causal_lm("Llama", num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    toy = Gpu("toy", 90, sms=2, shared_bytes=227 * 1024)
    with assume_gpu(toy), use_config("prefix_attention", programs=1):
        options = {**SAMPLED, **RECORDED, "max_new_tokens": 3}
        stock, ours = both(model, prompts(1, 9), "triton", **options)
    for one, other in zip(ours.logits, stock.logits, strict=True):
        assert max_error(one, other) < 1e-4
    assert torch.equal(ours.sequences, stock.sequences)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "beam search is not supported"),
        ({"num_beams": 2, "do_sample": True}, "beam sample is not supported"),
        ({"prompt_lookup_num_tokens": 2}, "assisted generation is not supported"),
        ({"penalty_alpha": 0.5, "top_k": 4}, "contrastive search is not supported"),
        ({"assistant_model": None}, "assistant_model is not supported"),
        ({"pixel_values": None}, "pixel_values is not supported"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0 is not supported"),
        ({"output_hidden_states": True}, "output_hidden_states=True is not supported"),
        ({"prefill_chunk_size": 9}, "prefill_chunk_size=9 is not supported"),
        ({"use_cache": False}, "use_cache=False is not supported"),
        ({"attention_mask": torch.tensor([[0, 1, 1]])}, "attention_mask has zeros"),
        ({"pad_token_id": 7}, "padding is not supported"),
        ({"impl": "cuda"}, "impl must be one of eager, portable, triton, not 'cuda'"),
    ],
)
def test_refusals(llama: Any, options: dict, message: str):
    """Guards what would be computed wrongly; and the model, which must run as before."""
    with pytest.raises(ValueError, match=message):
        generate(llama, torch.tensor([[7, 8, 9]]), **{"max_new_tokens": 2, **options})
    assert llama.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match=r"input_ids must be int \[B, P\], not \[3\]"):
        generate(llama, torch.tensor([7, 8, 9]))
