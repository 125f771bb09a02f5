"""The streamed text of a rollout, against `Stopping.text` at its end and after every token."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from model.config import TINY
from model.text.tokenizer import Tokenizer
from pacore_sched.engine.stopping import Stopping
from pacore_sched.sched.request import Group, Rollout, Sampling
from pacore_sched.serve.text.rollout_text import RolloutText


class Pieces:
    """A vocabulary of arbitrary byte strings, so that tokens may split characters anywhere."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def token_bytes(self, id: int) -> bytes:
        return self.pieces[id]


def rollout_of(stops: list[str], ignore_eos: bool = False, max_tokens: int = 10**6) -> Rollout:
    sampling = Sampling(max_tokens, stop=tuple(stops), ignore_eos=ignore_eos)
    group = Group(path=(), last_token=0, sampling=sampling)
    return Rollout(group, index=0, seed=0, max_tokens=max_tokens)


ALPHABET = "ab\u00e9\u20ac\U0001f600\ufffd"
texts = st.text(ALPHABET, min_size=1, max_size=4)
scraps = st.sampled_from([c.encode()[i:j] for c in ALPHABET for i in (0, 1) for j in (1, 2, 3, 4)])
pieces = st.lists(scraps | texts.map(str.encode) | st.binary(max_size=3), min_size=2, max_size=8)


@settings(max_examples=500)
@given(
    pieces,
    st.lists(st.integers(0, 7), min_size=1, max_size=30),
    st.lists(texts, max_size=3),
    st.booleans(),
    st.lists(st.integers(1, 4), min_size=1),
)
def test_pieces_make_up_the_final_text(pieces, ids, stops, ignore_eos, sizes):
    """Guards text that must be taken back: of stop strings inside and across tokens, of the end of
    the turn (even if it is text to the tokenizer), and of split and invalid characters. Tokens may
    come several at a time, and the rollout may end after any of them."""
    vocabulary, eos = Pieces(pieces), {len(pieces) - 1}
    stopping, rollout = Stopping(vocabulary, eos), rollout_of(stops, ignore_eos)
    for id in ids:
        rollout.tokens.append(id % len(pieces))
        rollout.finish_reason = stopping.reason(rollout)
        if rollout.finish_reason:
            break
    rollout.finish_reason = rollout.finish_reason or "length"
    stream = RolloutText(vocabulary.token_bytes, () if ignore_eos else eos, stops)
    sent, start, turn = "", 0, 0
    while start < len(rollout.tokens):
        size = sizes[turn % len(sizes)]
        sent += stream.push(rollout.tokens[start : start + size])
        start, turn = start + size, turn + 1
    final = stopping.text(rollout)
    assert final.startswith(sent)
    assert sent + stream.finish(final) == final
    assert len(stream.offsets) == len(rollout.tokens)


@given(st.lists(texts, min_size=1, max_size=3), st.lists(texts, max_size=8), st.integers(1, 4))
def test_no_more_is_held_back_than_needed(stops, words, size):
    """Guards the latency of a stream: all is sent but half a character and a stop string begun."""
    data = "".join(words).encode()
    assume(not any(stop.encode() in data for stop in stops))
    tokens = [data[at : at + size] for at in range(0, len(data), size)]
    stream, sent = RolloutText(tokens.__getitem__, (), stops), ""
    for id in range(len(tokens)):
        sent += stream.push([id])
        seen = b"".join(tokens[: id + 1])
        ends = [seen[at:] for at in range(len(seen))]
        held = next((e for e in ends if any(s.encode().startswith(e) for s in stops)), b"")
        assert sent == seen.removesuffix(held).decode("utf-8", errors="ignore")


def test_what_each_token_wrote():
    """Guards log-probabilities: of a split character, of the end of the turn, of text held back."""
    tokenizer = Tokenizer.byte_level(TINY)
    ids = [*tokenizer.encode("a\u20ac!"), TINY.tokens.eos[0]]
    stream = RolloutText(tokenizer.token_bytes, TINY.tokens.eos, ["!!"])
    assert [stream.push([id]) for id in ids] == ["a", "", "", "\u20ac", "", ""]
    assert stream.offsets == [0, 1, 1, 1, 2, 3]
    assert stream.finish("a\u20ac!") == "!"


def test_the_stop_string_that_begins_first_is_held_back():
    """Two have begun: the text must end before the earlier one."""
    stream = RolloutText([b"ab", b"c", b"!"].__getitem__, (), ["abc!", "b!"])
    assert [stream.push([0]), stream.push([1]), stream.push([2])] == ["", "", ""]
    assert stream.finish("") == ""


@pytest.mark.parametrize("stops", [[], ["ab" * 50]])
def test_little_is_kept(stops):
    """Guards against searching all of the text for every token."""
    stream = RolloutText([b"ab", b"a"].__getitem__, (), stops)
    sent = "".join(stream.push([0, 1]) for _ in range(1_000))
    assert sent + stream.finish("aba" * 1_000) == "aba" * 1_000
    assert len(stream._last) <= 99 and len(stream._text) <= 99


def test_an_error_has_no_rest():
    """The text of a rollout with broken logits is empty, whatever was sent before."""
    stream = RolloutText([b"half a thought"].__getitem__)
    assert stream.push([0]) == "half a thought"
    assert stream.finish("") == ""
