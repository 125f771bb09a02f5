"""Where rollouts end: eos, stop strings across tokens and characters, lengths; and their texts."""

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
    """A vocabulary of any strings of bytes, so that tokens may cut texts anywhere."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces, self.asked = pieces, 0

    def token_bytes(self, id: int) -> bytes:
        self.asked += 1
        return self.pieces[id]


def rollout_of(max_tokens: int = 10**6, **sampling: object) -> Rollout:
    group = Group(path=(), last_token=0, sampling=Sampling(max_tokens, **sampling))
    return Rollout(group, index=0, seed=0, max_tokens=max_tokens)


def generate(stopping: Stopping, rollout: Rollout, tokens: list[int]) -> str:
    """Feed tokens until one ends the rollout; its text."""
    for token in tokens:
        rollout.tokens.append(token)
        rollout.finish_reason = stopping.reason(rollout)
        if rollout.finish_reason:
            break
    return stopping.text(rollout)


def test_eos_ends_and_is_not_text():
    """Every eos id of the model ends a turn; `ignore_eos` is for pinned lengths."""
    stopping = Stopping(TOKENIZER, EOS)
    said = TOKENIZER.encode("Yes.")
    for eos in EOS:
        rollout = rollout_of()
        assert generate(stopping, rollout, [*said, eos, *said]) == "Yes."
        assert (rollout.finish_reason, rollout.tokens) == ("stop", [*said, eos])
    pinned = rollout_of(9, ignore_eos=True)
    assert generate(stopping, pinned, [*said, EOS[0], *said]) == "Yes.Yes."
    assert pinned.finish_reason == "length"


def test_an_eos_that_is_text_to_the_tokenizer_is_not_said():
    """Guards against a checkpoint whose eos its tokenizer does not flag as special."""
    stopping = Stopping(Pieces([b"Yes", b"</s>"]), {1})
    assert generate(stopping, rollout_of(), [0, 0, 1]) == "YesYes"
    assert generate(stopping, rollout_of(3, ignore_eos=True), [0, 0, 1]) == "YesYes</s>"


def test_length_gives_way_to_stop():
    """A rollout whose last allowed token is its eos has stopped of itself."""
    stopping = Stopping(TOKENIZER, EOS)
    for tokens, reason in (([65, 66, EOS[1]], "stop"), ([65, 66, 67], "length")):
        rollout = rollout_of(3)
        generate(stopping, rollout, tokens)
        assert rollout.finish_reason == reason


def test_an_error_says_nothing():
    """What a rollout with broken logits said before must not be passed on."""
    rollout = rollout_of()
    rollout.tokens, rollout.finish_reason = TOKENIZER.encode("half a thought"), "error"
    assert Stopping(TOKENIZER, EOS).text(rollout) == ""


@given(
    st.text("ab\u20ac\U0001f600", max_size=40),
    st.lists(st.text("ab\u20ac\U0001f600", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), min_size=1, max_size=200),
)
def test_stop_strings_wherever_tokens_cut(text: str, stops: list[str], cuts: list[int]):
    """The text ends before the first stop string, however tokens cut bytes and characters; the
    rollout ends with the first token that completes one."""
    said, pieces, start = text.encode(), [], 0
    while start < len(said):
        size = cuts[len(pieces) % len(cuts)]
        pieces.append(said[start : start + size])
        start += size
    rollout = rollout_of(stop=tuple(stops))
    told = generate(Stopping(Pieces(pieces), ()), rollout, list(range(len(pieces))))
    prefixes = [b"".join(pieces[: n + 1]) for n in range(len(pieces))]
    complete = [any(stop.encode() in prefix for stop in stops) for prefix in prefixes]
    if any(complete):
        assert rollout.finish_reason == "stop"
        assert len(rollout.tokens) == complete.index(True) + 1
        known = prefixes[complete.index(True)]
        first = min(known.find(stop.encode()) % (len(known) + 1) for stop in stops)
        assert told == known[:first].decode()
    else:
        assert rollout.finish_reason is None
        assert told == text


def test_the_first_of_two_stop_strings():
    """One token may complete both: the text ends before the one that begins first."""
    for stops in (("b", "a"), ("a", "b")):
        assert generate(Stopping(Pieces([b"xaby"]), ()), rollout_of(stop=stops), [0]) == "x"


def test_a_stop_string_costs_a_short_tail():
    """Guards against detokenising the whole text for every token."""
    vocabulary = Pieces([b"a", b"b"])
    stopping, rollout = Stopping(vocabulary, ()), rollout_of(stop=("bbb",))
    looked = []
    bytes_of = stopping._token_bytes
    stopping._token_bytes = lambda token: looked.append(token) or bytes_of(token)
    rollout.tokens = [0] * 10_000
    assert stopping.reason(rollout) is None
    assert len(looked) == 3
    assert vocabulary.asked == 1  # and each token's bytes are made once


def test_half_a_character():
    """A text cut off inside a character says so."""
    stopping = Stopping(TOKENIZER, EOS)
    tokens = TOKENIZER.encode("5 \u20ac")
    assert generate(stopping, rollout_of(len(tokens) - 1), tokens) == "5 \ufffd"


@pytest.mark.parametrize(("stops", "message"), [(["x", ""], "empty"), (["\ud800"], "Unicode")])
def test_stop_strings_are_checked(stops: list[str], message: str):
    """An empty stop string would end every rollout before its first word."""
    assert checked_stops(["\n\n", "END"]) == ("\n\n", "END")
    with pytest.raises(InputError, match=message):
        checked_stops(stops)
