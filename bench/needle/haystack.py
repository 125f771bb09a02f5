"""Haystacks: long texts of made-up sentences, with needles, facts about a number, between them.

A haystack depends on the tokenizer, its length and a seed only. Its sentences have no digits and
none of the needles' nouns, so that each number can only come from its needle.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from model.errors import InputError

Encode = Callable[[str], Sequence[int]]

NEEDLE = " {} is {}."
SUBJECTS = (
    *("The password of the stone tower", "The telephone number of Doctor Miller"),
    *("The secret number of Paris", "The number on the red gate", "The price of the golden ring"),
    *("The code of the bank vault", "The weight of the blue whale", "The distance to the moon"),
    *("The height of the north wall", "The population of the capital", "The length of the river"),
    *("The speed of the fastest train", "The age of the universe", "The number of the lost ticket"),
)
DIGITS = 5
SENTENCE = " {} {} {} the {} {} to the {} {}."
WORDS = (  # of each place in the sentence
    "In the morning, After lunch, Before dinner, On Monday, Last week, At noon, That evening",
    "Anna, Boris, Clara, David, Elena, Felix, Greta, Hugo, Irene, Jonas, Karla, Leo, Maria, Nils",
    "brought, carried, gave, lent, returned, sent, showed, sold",
    "big, broken, bright, cheap, clean, empty, green, heavy, round, soft, strange, wooden",
    "basket, blanket, book, bottle, chair, clock, coat, hammer, kettle, ladder, lamp, map, violin",
    "bakery, bridge, farm, garden, harbour, kitchen, library, market, museum, office, school",
    "and waited for the rain to stop, and told a long story about it, because the road was closed,"
    " while the children were playing, and forgot to close the window,"
    " but the owner did not see it, and then went home",
)


@dataclass(frozen=True)
class Needle:
    """What has the number; `start` is the index of the needle's first token."""

    subject: str
    number: str
    start: int


@dataclass(frozen=True)
class Haystack:
    """Token ids, and the needles among them, the first one first."""

    ids: Sequence[int]
    needles: Sequence[Needle]


def build(encode: Encode, tokens: int, depths: Sequence[float], seed: int) -> Haystack:
    """A haystack of exactly `tokens` tokens, with a needle at each of the depths, ascending.

    encode: a text's token ids
    depths: the share of the tokens before a needle, which begins after the sentence that reaches
        that share

    Its first sentence is cut to fit. Raises InputError if it is too short for the needles.
    """
    draw = random.Random(f"{tokens}/{seed}")
    subjects = draw.sample(SUBJECTS, len(depths))
    numbers = draw.sample(range(10 ** (DIGITS - 1), 10**DIGITS), len(depths))
    needles = [encode(NEEDLE.format(*pair)) for pair in zip(subjects, numbers, strict=True)]
    missing = tokens - sum(map(len, needles))
    sentences: list[Sequence[int]] = []
    while missing > 0:
        sentence = encode(_sentence(draw))
        sentences.append(sentence[max(len(sentence) - missing, 0) :])
        missing -= len(sentence)
    ids: list[int] = []
    placed: list[Needle] = []
    for sentence in reversed(sentences):  # the cut one comes first
        ids += sentence
        index = len(placed)
        if index < len(depths) and len(ids) >= depths[index] * tokens:
            placed.append(Needle(subjects[index], str(numbers[index]), len(ids)))
            ids += needles[index]
    if len(placed) < len(depths):
        raise InputError(f"a haystack of {tokens} tokens is too short for {len(depths)} needles")
    return Haystack(ids, placed)


def _sentence(draw: random.Random) -> str:
    return SENTENCE.format(*(draw.choice(words.split(", ")) for words in WORDS))
