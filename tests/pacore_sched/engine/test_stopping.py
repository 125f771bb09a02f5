"""Stop conditions: eos, stop strings across tokens and characters, lengths; and the texts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import TINY
from model.errors import InputError
from model.text.tokenizer import Tokenizer
from pacore_sched.engine.stopping import Stopping, checked_stops
from pacore_sched.sched.request import Group, Rollout, Sampling

TOKENIZER = Tokenizer.byte_level(TINY)
EOS = TINY.tokens.eos


class Pieces:
    """A vocabulary of arbitrary byte strings, so that tokens may split texts anywhere."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces, self.lookups = pieces, 0

    def token_bytes(self, id: int) -> bytes:
        self.lookups += 1
        return self.pieces[id]


def rollout_of(max_tokens: int = 10**6, **sampling: object) -> Rollout:
    group = Group(path=(), last_token=0, sampling=Sampling(max_tokens, **sampling))
    return Rollout(group, index=0, seed=0, max_tokens=max_tokens)


def generate(stopping: Stopping, rollout: Rollout, tokens: list[int]) -> str:
    """Append tokens until one ends the rollout; returns its text."""
    for token in tokens:
        rollout.tokens.append(token)
        rollout.finish_reason = stopping.reason(rollout)
        if rollout.finish_reason:
            break
    return stopping.text(rollout)


def test_eos_ends_and_is_not_text():
    """Every eos id of the model ends a turn; `ignore_eos` is for rollouts of a fixed length."""
    stopping = Stopping(TOKENIZER, EOS)
    words = TOKENIZER.encode("Yes.")
    for eos in EOS:
        rollout = rollout_of()
        assert generate(stopping, rollout, [*words, eos, *words]) == "Yes."
        assert (rollout.finish_reason, rollout.tokens) == ("stop", [*words, eos])
    pinned = rollout_of(9, ignore_eos=True)
    assert generate(stopping, pinned, [*words, EOS[0], *words]) == "Yes.Yes."
    assert pinned.finish_reason == "length"


def test_an_eos_that_is_text_to_the_tokenizer_is_removed():
    """Guards against a checkpoint whose tokenizer does not flag its eos as special."""
    stopping = Stopping(Pieces([b"Yes", b"</s>"]), {1})
    assert generate(stopping, rollout_of(), [0, 0, 1]) == "YesYes"
    assert generate(stopping, rollout_of(3, ignore_eos=True), [0, 0, 1]) == "YesYes</s>"


def test_stop_takes_precedence_over_length():
    """A rollout whose last allowed token is its eos ends with "stop"."""
    stopping = Stopping(TOKENIZER, EOS)
    for tokens, reason in (([65, 66, EOS[1]], "stop"), ([65, 66, 67], "length")):
        rollout = rollout_of(3)
        generate(stopping, rollout, tokens)
        assert rollout.finish_reason == reason


def test_an_error_has_no_text():
    """The text of a rollout with broken logits must not be passed on."""
    rollout = rollout_of()
    rollout.tokens, rollout.finish_reason = TOKENIZER.encode("half a thought"), "error"
    assert Stopping(TOKENIZER, EOS).text(rollout) == ""


@given(
    st.text("ab\u20ac\U0001f600", max_size=40),
    st.lists(st.text("ab\u20ac\U0001f600", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), min_size=1, max_size=200),
)
def test_stop_strings_wherever_tokens_split(text: str, stops: list[str], cuts: list[int]):
    """However tokens split bytes and characters, the text ends before the first stop string, and
    the rollout ends with the first token that completes one."""
    words, pieces, start = text.encode(), [], 0
    while start < len(words):
        size = cuts[len(pieces) % len(cuts)]
        pieces.append(words[start : start + size])
        start += size
    rollout = rollout_of(stop=tuple(stops))
    text_found = generate(Stopping(Pieces(pieces), ()), rollout, list(range(len(pieces))))
    prefixes = [b"".join(pieces[: n + 1]) for n in range(len(pieces))]
    complete = [any(stop.encode() in prefix for stop in stops) for prefix in prefixes]
    if any(complete):
        assert rollout.finish_reason == "stop"
        assert len(rollout.tokens) == complete.index(True) + 1
        complete_text = prefixes[complete.index(True)]
        first = min(complete_text.find(stop.encode()) % (len(complete_text) + 1) for stop in stops)
        assert text_found == complete_text[:first].decode()
    else:
        assert rollout.finish_reason is None
        assert text_found == text


def test_the_first_of_two_stop_strings():
    """One token may complete both: the text ends before the one that begins first."""
    for stops in (("b", "a"), ("a", "b")):
        assert generate(Stopping(Pieces([b"xaby"]), ()), rollout_of(stop=stops), [0]) == "x"


def test_a_stop_string_costs_a_short_tail():
    """Guards against detokenising the whole text for every token."""
    vocabulary = Pieces([b"a", b"b"])
    stopping, rollout = Stopping(vocabulary, ()), rollout_of(stop=("bbb",))
    requested = []
    bytes_of = stopping._token_bytes
    stopping._token_bytes = lambda token: requested.append(token) or bytes_of(token)
    rollout.tokens = [0] * 10_000
    assert stopping.reason(rollout) is None
    assert len(requested) == 3
    assert vocabulary.lookups == 1  # each token's bytes are looked up once


def test_half_a_character():
    """A text that ends inside a character ends with U+FFFD."""
    stopping = Stopping(TOKENIZER, EOS)
    tokens = TOKENIZER.encode("5 \u20ac")
    assert generate(stopping, rollout_of(len(tokens) - 1), tokens) == "5 \ufffd"


@pytest.mark.parametrize(("stops", "message"), [(["x", ""], "empty"), (["\ud800"], "Unicode")])
def test_stop_strings_are_checked(stops: list[str], message: str):
    """An empty stop string would end every rollout before its first word."""
    assert checked_stops(["\n\n", "END"]) == ("\n\n", "END")
    with pytest.raises(InputError, match=message):
        checked_stops(stops)
