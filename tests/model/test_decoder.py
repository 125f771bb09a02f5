"""Tests of the decoder against transformers: Qwen3 and Llama checkpoints, with paged KV."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.plan_node import PlanNode
from kernels.prefix_plan import PrefixPlan
from kernels.runtime.configs import Gpu, assume_gpu, use_config
from model.decoder import Step
from model.errors import InputError
from model.step3vl import Step3VL
from tests.support.errors import max_error

pytestmark = pytest.mark.judge

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "rope_theta": 1e6,
    "eos_token_id": 96,
    "bos_token_id": 95,
}
FORMS = ("eager", "portable")
LENGTH = 150  # more than two pages of 64


def randomise(module: torch.nn.Module) -> None:
    """Draw weights large enough, and norms far enough from 1, for a wrong one to be noticed."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)


@pytest.fixture(scope="module", params=["qwen3", "qwen3-tied", "llama"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A tiny random checkpoint written by transformers, and transformers' logits."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    if request.param == "llama":
        reference = LlamaForCausalLM(LlamaConfig(**SHAPE, rms_norm_eps=1e-5))
    else:
        reference = Qwen3ForCausalLM(
            Qwen3Config(**SHAPE, tie_word_embeddings=request.param == "qwen3-tied")
        )
    randomise(reference)
    path = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(path)
    ids = torch.randint(0, 95, (LENGTH,))
    with torch.inference_mode():
        logits = reference.eval()(ids[None]).logits[0]
    return path, ids, logits


@pytest.mark.parametrize("impl", FORMS)
def test_whole_forward(saved: tuple[Path, Tensor, Tensor], impl: str):
    """Guards against any error in names, fusions, rotation, norms, GQA or masks."""
    path, ids, expected = saved
    logits = Step3VL.from_pretrained(path, impl=impl)(ids)
    assert max_error(logits, expected) < 1e-4


@pytest.mark.parametrize("impl", FORMS)
def test_interleaved_gate_up(saved: tuple[Path, Tensor, Tensor], impl: str, tmp_path: Path):
    """Guards against gate and up rows stored alternately that change the logits, or that are saved
    to other than the published tensors."""
    path, ids, expected = saved
    model = Step3VL.from_pretrained(path, impl=impl, interleaved_gate_up=True)
    plain = Step3VL.from_pretrained(path, impl=impl)
    for packed in (model, plain):
        packed.decoder.checkpoint_tensors()  # unpacks
    stored, halves = (m.decoder.layers[0].gate_up.weight for m in (model, plain))
    width = SHAPE["intermediate_size"]
    assert torch.equal(stored[4:6], halves[[2, 2 + width]])
    assert max_error(model(ids), expected) < 1e-4
    model.save_pretrained(tmp_path / "again")
    again = Step3VL.from_pretrained(tmp_path / "again", impl=impl)
    name = f"model.layers.{SHAPE['num_hidden_layers'] - 1}.mlp.up_proj.weight"
    assert torch.equal(again.checkpoint_tensors()[name], plain.checkpoint_tensors()[name])


def test_interleaved_random_weights():
    """Guards against random weights that depend on the storage order instead of the names."""
    models = [Step3VL.from_preset("tiny", interleaved_gate_up=flag) for flag in (False, True)]
    tensors = [model.checkpoint_tensors() for model in models]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    logits = [model(range(20)) for model in models]
    assert max_error(*logits) < 1e-5


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("chunks", [(LENGTH,), (64, 64, 22), (37, 1, 63, 49), (1,) * 70 + (80,)])
def test_through_the_cache(saved: tuple[Path, Tensor, Tensor], impl: str, chunks: tuple[int, ...]):
    """Guards against prefill, chunked prefill or decoding that differs from one whole forward."""
    path, ids, expected = saved
    model = Step3VL.from_pretrained(path, impl=impl)
    cache, done, parts = model.new_cache(3), 0, []
    with torch.inference_mode():
        for chunk in chunks:
            step = Step.of_sequence(done, chunk, cache)
            hidden = model.decoder(model.decoder.embed(ids[done : done + chunk]), step, cache)
            parts.append(model.decoder.logits(hidden))
            done += chunk
    assert max_error(torch.cat(parts), expected) < 1e-4


@pytest.mark.parametrize("impl", FORMS)
def test_a_fork_equals_separate_sequences(saved: tuple[Path, Tensor, Tensor], impl: str):
    """Guards against two continuations of a shared prompt node that differ from two separate
    forwards. Both are decoded in one step of two rows, after a prompt that ends inside a page."""
    path, ids, _ = saved
    model = Step3VL.from_pretrained(path, impl=impl)
    cache, prompt, page = model.new_cache(6), 70, 64
    tails = ids[70:73], ids[100:103]
    with torch.inference_mode():
        model.decoder(model.decoder.embed(ids[:prompt]), Step.of_sequence(0, prompt, cache), cache)
        for i in range(3):
            nodes = [
                PlanNode([0, 1], prompt, 0, 2),
                PlanNode([4], i + 1, 0, 1, num_new=1),
                PlanNode([2], i + 1, 1, 2, num_new=1),
            ]
            plan = PrefixPlan.build(nodes, num_rows=2, num_pages=6, page_size=page)
            step = Step(torch.full((2,), prompt + i), torch.tensor([4 * page, 2 * page]) + i, plan)
            tokens = torch.stack([tail[i] for tail in tails])
            logits = model.decoder.logits(model.decoder(model.decoder.embed(tokens), step, cache))
        for tail, row in zip(tails, logits, strict=True):
            # Both are rounded, in orders that depend on the CPU: 1.02e-5 with AVX2.
            assert max_error(row, model(torch.cat([ids[:prompt], tail]))[-1]) < 2e-5


def test_generate_greedy_equals_transformers(saved: tuple[Path, Tensor, Tensor]):
    """Guards the loop: prefill once, then one token per step, stop at eos."""
    from transformers import AutoModelForCausalLM

    path, ids, _ = saved
    reference = AutoModelForCausalLM.from_pretrained(path)
    prompt = ids[None, :60]
    expected = reference.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20
    )
    model = Step3VL.from_pretrained(path)
    assert model.generate(ids[:60], max_tokens=20) == expected[0, 60:].tolist()


def test_mistakes_are_named(saved: tuple[Path, Tensor, Tensor]):
    """Guards against an index error deep inside, or a wrong answer, for bad input."""
    model = Step3VL.from_pretrained(saved[0])
    for ids, message in [
        ([], "non-empty"),
        ([[1, 2]], "non-empty, one-dimensional sequence"),
        ([0.5], "integers"),
        ([97], r"\[0, 97\)"),
        ([-1], r"\[0, 97\)"),
        ([1] * 257, "exceed the context of 256"),
    ]:
        with pytest.raises(InputError, match=message):
            model(ids)
    with pytest.raises(InputError, match="no vision tower"):
        model([1], images=["photo.png"])
    with pytest.raises(InputError, match="exceed the context"):
        model.generate([1] * 200, max_tokens=100)


TRITON = dict.fromkeys(("rms_norm", "silu_mul", "qk_norm_rope", "prefix_attention"), "triton")


def fork_step(model: Step3VL, prompt: Tensor, leaves: int, impl: dict | str, steps: int) -> Tensor:
    """Prefill `prompt`, then run `steps` decode steps of `leaves` rollouts with fixed ids.

    Returns all logits: [len(prompt) + steps * leaves, vocab].
    """
    model.set_impl(impl)
    decoder, size = model.decoder, len(prompt)
    cache = model.new_cache(1 + leaves)
    logits = [decoder(decoder.embed(prompt), Step.of_sequence(0, size, cache), cache)]
    nodes = [PlanNode([0], size, 0, leaves)]
    nodes += [PlanNode([1 + leaf], 1, leaf, leaf + 1, 1) for leaf in range(leaves)]
    grown, device = nodes, model.device
    positions = torch.full((leaves,), size, device=device)
    slots = torch.arange(1, 1 + leaves, device=device) * cache.page_size
    step = None
    for index in range(steps):
        if step is None or impl == "eager":  # the eager form reads the host's nodes
            plan = PrefixPlan.build(
                grown, num_rows=leaves, num_pages=1 + leaves, page_size=64, device=device
            )
            step = Step(positions, slots, plan)
        ids = torch.arange(leaves, device=device) + 10 * index
        logits.append(decoder(decoder.embed(ids), step, cache))
        grown = nodes[:1] + [
            PlanNode(n.pages, n.kv_len + 1, n.row_start, n.row_end, 1) for n in grown[1:]
        ]
        if impl == "eager":
            positions, slots = positions + 1, slots + 1
        else:
            step.advance()
    return decoder.logits(torch.cat(logits))


def test_triton_ops_through_layers(saved: tuple[Path, Tensor, Tensor], triton_device: str):
    """Guards all Triton impls together: prefill, fused decode, a plan advanced on the device."""
    path, ids, _ = saved
    model = Step3VL.from_pretrained(path, device=triton_device)
    prompt = ids[:7].to(triton_device)
    toy = Gpu("toy", 90, sms=1, shared_bytes=227 * 1024)
    with torch.inference_mode(), assume_gpu(toy), use_config("prefix_attention", programs=1):
        result = fork_step(model, prompt, 2, TRITON, steps=2)
        expected = fork_step(model, prompt, 2, "eager", steps=2)
    assert max_error(result, expected) < 1e-4


def test_fp8_cache(saved: tuple[Path, Tensor, Tensor]):
    """Guards against FP8 pages that are inaccurate, or that secretly hold more than 8 bits."""
    path, ids, logits = saved
    model = Step3VL.from_pretrained(path)
    cache = model.new_cache(3, torch.float8_e4m3fn)
    assert cache.k.dtype == torch.float8_e4m3fn
    decoder = model.decoder
    with torch.inference_mode():
        step = Step.of_sequence(0, LENGTH, cache)
        result = decoder.logits(decoder(decoder.embed(ids), step, cache))
    # With weights this large, attention is peaked and the error is far above that of real models.
    assert 1e-3 < ((result - logits).square().mean() / logits.square().mean()).sqrt() < 0.25
