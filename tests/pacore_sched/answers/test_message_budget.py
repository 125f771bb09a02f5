"""Messages that are too long together: what a prompt keeps of them, and what the result says."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import TINY
from model.step3vl import Step3VL
from model.text.tokenizer import Tokenizer
from pacore_sched.answers import message_budget
from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.live import Answer
from pacore_sched.answers.message_budget import (
    MIN_TOKENS,
    fit_messages,
    prompt_limit,
    tail,
    tokens_kept,
)
from pacore_sched.answers.pacore import Pacore, engine_for
from pacore_sched.answers.problem_run import Problem
from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.request import Sampling
from tests.pacore_sched.answers.hashed_pacore import hashed

BYTES = Tokenizer.byte_level(TINY)  # a token per byte
QUESTION = [{"role": "user", "content": "hi"}]


def rollout(text: str, finish_reason: str = "stop", index: int = 0) -> RolloutResult:
    return RolloutResult("p", 0, index, 1, 5, finish_reason, text, len(text), -1.0)


def fit(results: list[RolloutResult], limit: int):
    """The fitted prompt, a "Q" and all messages in brackets, and its text."""
    built = []

    def build(texts):
        built.append("Q" + "".join(f"<{text}>" for text in texts if text))
        return BYTES.encode(built[-1], special=False)

    prompt = fit_messages(results, build, limit, BYTES)
    assert len(prompt.ids) <= limit
    (text,) = {text for text in built if BYTES.encode(text, special=False) == prompt.ids}
    return prompt, text


@settings(max_examples=300)
@given(st.lists(st.integers(0, 300), max_size=8), st.integers(-50, 1500), st.data())
def test_tokens_kept(lengths: list[int], budget: int, data: st.DataObject):
    """Messages that exceed the budget, are cut more than needed or unequally, or are dropped while
    a longer one stays or cutting would do."""
    unfinished = data.draw(st.sets(st.sampled_from(range(8)))) & set(range(len(lengths)))
    kept = tokens_kept(lengths, budget, unfinished)
    assert sum(kept) <= max(budget, 0)
    assert all(0 <= some <= all_ for some, all_ in zip(kept, lengths, strict=True))
    in_prompt = [i for i, tokens in enumerate(kept) if tokens]
    cut = [i for i in in_prompt if kept[i] < lengths[i]]
    assert all(kept[i] == max(kept) >= MIN_TOKENS for i in cut)
    if cut:
        one_more = sum(min(lengths[i], max(kept) + 1) for i in in_prompt)
        assert one_more > budget
    dropped = [i for i, length in enumerate(lengths) if length and not kept[i]]
    if dropped:
        worth = {i: (i in unfinished, lengths[i]) for i in range(len(lengths))}
        assert min(worth[i] for i in dropped) >= max((worth[i] for i in in_prompt), default=(0, 0))
        last = min(dropped, key=lambda i: (worth[i], -i))
        assert sum(min(lengths[i], MIN_TOKENS) for i in [*in_prompt, last]) > budget


@given(st.text(max_size=60), st.integers(0, 80))
def test_tail(text: str, tokens: int):
    """A tail with half a character, with more tokens than allowed, or with fewer than fit."""
    end, length = tail(text, tokens, BYTES)
    assert text.endswith(end)
    assert length == min(tokens, len(text.encode()))
    assert length - 3 <= len(end.encode()) <= length


def test_tail_of_long_tokens():
    """A tail that is too short because its tokens have many characters."""
    words = SimpleNamespace(
        encode=lambda text, special: [text.count("w", 0, at + 1) for at in range(0, len(text), 20)],
        token_bytes=lambda id: b"w" + b"." * 19,
    )
    text = ("w" + "." * 19) * 50
    assert tail(text, 30, words) == (text[-600:], 30)


def test_a_context_of_128k_is_filled():
    """A longer context that is left half empty, or messages that are tokenised over and over: 24 of
    16,000 tokens and three unfinished ones take seconds then. The report's setting: 64K of 128K for
    an answer, so 64K for messages."""
    encoded = []

    def encode(text: str, special: bool) -> list[int]:
        encoded.append(len(text))
        return BYTES.encode(text, special=special)

    def build(texts):
        return BYTES.encode("Q" + "".join(f"<{text}>" for text in texts if text), special=False)

    limit = prompt_limit(131072, PrefixTree(10_000, 64), first_prompt=1024, max_tokens=65536)
    assert limit == 131072 - (131072 - 1024) // 2
    texts = ["x" * 16_000] * 24 + ["<think>" + "y" * 60_000] * 3
    results = [rollout(text) for text in texts]
    counting = SimpleNamespace(encode=encode, token_bytes=BYTES.token_bytes)
    prompt = fit_messages(results, build, limit, counting)
    assert 0.99 * limit <= len(prompt.ids) <= limit
    assert (len(prompt.cut), prompt.dropped) == (27, ())
    assert sum(encoded) < 4 * sum(map(len, texts))


def test_messages_that_fit_are_unchanged():
    """A message that is marked or shortened without need."""
    results = [rollout("thoughts</think>\n\n4"), rollout("5"), rollout("no end</think>")]
    prompt, text = fit(results, 100)
    assert text == "Q<\n\n4><5>"
    assert (prompt.cut, prompt.dropped) == ((), ())


def test_long_messages_lose_their_beginnings():
    """A long message that is dropped, keeps its beginning, or is cut although it is short."""
    results = [rollout("a" * 500 + "first"), rollout("short"), rollout("b" * 400 + "third")]
    prompt, text = fit(results, 300)
    assert (prompt.cut, prompt.dropped) == ((0, 2), ())
    assert len(prompt.ids) > 295
    first, second, third = text[2:-1].split("><")
    assert second == "short"
    for message, letter, end in ((first, "a", "first"), (third, "b", "third")):
        assert message.startswith(f"[{message_budget.CUT}]\n{letter}")
        assert message.endswith(letter + end)


def test_unfinished_rollouts_pass_on_a_bounded_end():
    """All thoughts of a rollout that was cut off, in a prompt with room for them, or without saying
    that they have no conclusion."""
    long, short = "x" * 5000 + "the end", "brief"
    results = [rollout(long, "length"), rollout(short, "length"), rollout("<think>hm", "stop")]
    results += [rollout("thoughts</think>" + "y" * 900, "length")]
    prompt, text = fit(results, 9000)
    messages = text[2:-1].split("><", 2)
    assert messages[0] == f"[It was not finished. Its beginning is left out.]\n{long[-512:]}"
    assert messages[1] == "[It was not finished.]\nbrief"
    assert messages[2] == f"[It was not finished.]\n<think>hm><{'y' * 900}"
    assert (prompt.cut, prompt.dropped) == ((0,), ())


def test_unfinished_messages_are_dropped_first():
    """A finished message that makes room for one without a conclusion."""
    results = [rollout("x" * 100, "length"), rollout("y" * 120), rollout("z" * 90, "length")]
    prompt, text = fit(results, 155)
    assert (prompt.cut, prompt.dropped) == ((), (0, 2))
    assert text == f"Q<{'y' * 120}>"


def test_a_template_that_grows_with_its_messages():
    """Never ending, or a prompt that does not fit, for a template that repeats messages."""

    def build(texts):
        return [0] * (10 + 50 * sum(map(len, texts)))

    prompt = fit_messages([rollout("x" * 90), rollout("y" * 80)], build, 400, BYTES)
    assert len(prompt.ids) <= 400
    assert prompt.dropped == (0, 1)


def in_context(context: int, kv_tokens: int = 8192, widths=(4, 1), max_tokens: int = 110) -> Pacore:
    """A tiny model with this context, whose rollouts all have `max_tokens` tokens."""
    model = Step3VL.from_preset("tiny", seed=1)
    decoder = replace(model.config.decoder, max_positions=context)
    model.config = replace(model.config, decoder=decoder)
    engine = engine_for(model, max_running=4, kv_tokens=kv_tokens)
    return Pacore(model, engine, widths[:-1], Sampling(110, ignore_eos=True))


@pytest.mark.parametrize("context, kv_tokens", [(1200, 8192), (8192, 64 * 20)])
def test_a_synthesis_that_would_outgrow_the_context_or_the_kv(context: int, kv_tokens: int):
    """An answer that is empty although rollouts were generated, because the next prompt, or the
    prompt and its answer, is longer than the context or all KV pages."""
    answer = in_context(context, kv_tokens).answer(QUESTION)
    explore, synthesis = answer.rounds
    assert answer.error is None
    assert synthesis.rollouts[0].num_tokens == 110
    assert [len(explore.rollouts), len(synthesis.rollouts)] == [4, 1]
    assert synthesis.cut == (0, 1, 2, 3)
    assert not (explore.cut or explore.dropped or synthesis.dropped)
    room = min(context, kv_tokens) - 110
    assert room - 4 * 64 <= synthesis.prompt_tokens <= room


def test_a_rollout_that_takes_all_kv_pages():
    """A synthesis that is refused because the prompt and `max_tokens` need more than all pages."""
    pacore = hashed((4,), pages=320)
    sampling = Sampling(1000, ignore_eos=True)
    pacore.settings = replace(pacore.settings, sampling=sampling)
    answer = pacore.answer(QUESTION)
    synthesis = answer.rounds[1]
    assert answer.error is None
    assert synthesis.cut or synthesis.dropped
    assert synthesis.rollouts[0].num_tokens < 1000
    size = pacore.engine.executor.page_size
    tokens = synthesis.prompt_tokens + synthesis.rollouts[0].num_tokens
    assert 320 * size - size < tokens <= 320 * size + 1


def test_a_question_that_leaves_no_room_for_messages():
    """A question near the context's end whose synthesis fails, instead of answering it again."""
    question = [{"role": "user", "content": "x" * 300}]
    answer = in_context(400).answer(question)
    explore, synthesis = answer.rounds
    assert answer.error is None
    assert synthesis.dropped == (0, 1, 2, 3)
    assert synthesis.prompt_tokens == explore.prompt_tokens
    assert synthesis.rollouts[0].num_tokens == 400 - synthesis.prompt_tokens


@pytest.mark.parametrize("first", [500, 997, 998, 999])
def test_a_prompt_leaves_a_token(first: int):
    """A template that omits a long question, whose prompt may then fill the whole context."""
    tree = PrefixTree(num_pages=100, page_size=64)
    assert prompt_limit(1000, tree, first, 600) == 1000 - max((1000 - first) // 2, 1)
    assert prompt_limit(1000, tree, first, 1) == 999


def test_a_resumed_round_has_the_same_prompt():
    """A prompt that depends on the tokens of rollouts, of which a journal has only the texts; or
    two prompts in one round, after a resume with less memory, without an error."""

    def run(kv_tokens: int, known: list[RolloutResult]) -> Answer:
        (answer,) = in_context(8192, kv_tokens, (4, 2, 1)).answers(
            [Problem(QUESTION)], known=lambda id: known
        )
        return answer

    whole = run(64 * 20, [])
    results = [result for round_ in whole.rounds[:2] for result in round_.rollouts]
    known = [replace(result, tokens=(), logprobs=()) for result in results[:5]]
    again = run(64 * 20, known)
    assert again.error is None
    first, second = (result.rounds[1].rollouts[1] for result in (again, whole))
    assert replace(first, logprob=0.0, logprobs=()) == replace(second, logprob=0.0, logprobs=())
    assert again.text == whole.text
    less = run(64 * 16, known)
    assert "resume with the same --kv-tokens" in (less.error or "")
    assert [len(round_.rollouts) for round_ in less.rounds] == [4]
