"""The needle test: its haystacks, what counts as found, and that SmolLM2 finds."""

import json
import re
from collections.abc import Sequence

import pytest

from bench import __main__ as command
from bench.needle import study
from bench.needle.haystack import NEEDLE, SUBJECTS, Haystack, Needle, build
from bench.rows.run_tables import NEEDLE_DEPTHS
from model.config import preset
from model.errors import InputError
from model.step3vl import Step3VL
from model.text.tokenizer import Tokenizer
from pacore_sched.engine.engine import Engine

TOKENIZER = Tokenizer.byte_level(preset("tiny"))  # a token per byte: its texts can be checked
DEPTHS = [depth / 100 for depth in NEEDLE_DEPTHS]


def bytes_of(text: str) -> Sequence[int]:
    return TOKENIZER.encode(text)


def text_of(haystack: Haystack) -> str:
    return TOKENIZER.decode(haystack.ids)


@pytest.mark.parametrize("tokens", [3000, 3001, 10_000])
def test_haystack(tokens: int):
    """A haystack of another length than the row says, needles at other depths, cut or twice, a
    sentence with digits, which could be taken for an answer."""
    haystack = build(bytes_of, tokens, DEPTHS, seed=3)
    assert len(haystack.ids) == tokens
    text = text_of(haystack)
    longest = 150  # bytes of a sentence
    for needle, depth in zip(haystack.needles, DEPTHS, strict=True):
        sentence = NEEDLE.format(needle.subject, needle.number)
        assert text.count(sentence) == 1 and text.index(sentence) == needle.start
        assert text[needle.start - 1] == "."
        assert depth * tokens <= needle.start < depth * tokens + longest
    assert re.findall(r"\d+", text) == [needle.number for needle in haystack.needles]
    assert all(text.count(subject) <= 1 for subject in SUBJECTS)
    assert text.endswith(".")


def test_every_length():
    """A haystack that is too short because the sentence cut to fit is shorter than the cut."""
    for tokens in range(3000, 3100):
        assert len(build(bytes_of, tokens, DEPTHS, seed=0).ids) == tokens


def test_haystacks_differ_by_seed_and_are_the_same_again():
    """Forms compared on other texts, or repeats of one text that count several times."""
    first, again, second = (build(bytes_of, 3000, DEPTHS, seed) for seed in (0, 0, 1))
    assert first == again != second
    assert {n.number for n in first.needles}.isdisjoint(n.number for n in second.needles)
    text = text_of(build(bytes_of, 20_000, DEPTHS, 0))
    sentences = text.split(".")
    assert len({*sentences}) > 0.99 * len(sentences)


def test_too_many_needles():
    """A haystack without some of its needles, or a crash."""
    for tokens in (1, 400, 600):
        with pytest.raises(InputError, match=f"of {tokens} tokens is too short for 10 needles"):
            build(bytes_of, tokens, DEPTHS, 0)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        (" 48213. In", "48213"),
        (" 482135", "482135"),  # a longer number
        (" 4821", "4821"),
        (": 148213", "148213"),
        (" not 1, but 48213", "1"),
        (" Paris.", None),
        ("", None),
    ],
)
def test_first_number(answer: str, number: str | None):
    """A number taken for another that begins or ends with it, or a list of guesses for a hit."""
    assert study.first_number(answer) == number


def test_score():
    """Counts at another depth, and confused answers counted as found or as neither."""
    needles = [Needle("The age", str(10_000 + index), index) for index in range(10)]
    answers = [" 10000.", " 10001", " 10004", " 99999", " the", "", " 10009", "6", "7", "8"]
    counts = study.score(Haystack([], needles), answers)
    assert counts == {"asked": 10, "found": 2, "found_5": 1, "found_15": 1, "confused": 2}


@pytest.mark.parametrize(
    ("form", "tokens", "factor"),
    [
        ("linear", 512, 2),
        ("yarn", 16_384, 2),
        ("yarn", 24_576, 3),
        ("yarn-no-temperature", 9000, 2),
    ],
)
def test_scaling(form: str, tokens: int, factor: float):
    """A context that is not as long as the haystack, or a temperature that stays."""
    scaled = preset("smollm2-135m").with_rope_scaling(study.scaling_of(form, tokens)).decoder
    assert scaled.max_positions == factor * 8192 >= tokens
    assert scaled.rope_scaling.factor == factor
    plain = scaled.attention_scale == scaled.head_dim**-0.5
    assert plain == (form != "yarn")


def test_no_scaling():
    """Guards the baseline, whatever the length."""
    assert study.scaling_of("none", 32_768) is None


def test_questions_share_one_prefill(monkeypatch):
    """Other questions than the needles', or a haystack that is read once for each."""
    engines, prompts = [], []

    plain = Engine.submit

    def submit(engine, path, last_token, *arguments):
        engines.append(engine)
        prompts.append([*(id for segment in path for id in segment.content), last_token])
        return plain(engine, path, last_token, *arguments)

    monkeypatch.setattr(Engine, "submit", submit)
    haystack = study.haystack_of(tiny := Step3VL.from_preset("tiny"), 1500, seed=0)
    answers = study.ask(tiny, haystack)
    assert len(answers) == len(prompts) == len(NEEDLE_DEPTHS)
    questions = [f"\n\n{needle.subject} is" for needle in haystack.needles]
    assert prompts == [[*haystack.ids, *bytes_of(question)] for question in questions]
    computed = len(haystack.ids) + sum(len(question) - 1 for question in questions)
    assert engines[0].scheduler.counts.prefilled == computed


def test_smollm2_finds(capsys):
    """A wrong rotation, prompts that do not share the haystack or are not the asked ones, and rows
    that do not say what was found."""
    words = ["needle", "--tokens", "512", "--forms", "none", "--haystacks", "1", "--device", "cpu"]
    assert command.main([*words, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["asked"] == len(NEEDLE_DEPTHS) and row["found"] >= 9
    assert row["found"] == sum(row[f"found_{depth}"] for depth in NEEDLE_DEPTHS)
    assert (row["case"], row["impl"], row["factor"]) == ("smollm2-135m T512", "none", None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "100"], "--tokens: '100' is not an integer from 512 to 1,048,576"),
        (["--forms", "ntk"], "--forms: invalid choice: 'ntk'"),
        (["--haystacks", "0"], "--haystacks: '0' is not an integer from 1 to 1,000"),
    ],
)
def test_mistakes(words: list[str], message: str):
    """Guards the one-line message for a user's mistake."""
    with pytest.raises(InputError, match=message):
        command.main(["needle", *words])
