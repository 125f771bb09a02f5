"""Texts of random words with a given number of tokens, by the server's own tokenizer.

Tokenizers split texts at spaces, so the tokens of a text are the sum of those of its words.
"""

import random
from collections.abc import Mapping

TEXT = """
a I time year people way day man thing woman life child world school state family student group
country problem hand part place case week company system program question work government number
night point home water room mother area money story fact month lot right study book eye job word
business issue side kind head house service friend father power hour game line end member law
car city community name president team minute idea body information back parent face others
level office door health person art war history party result change morning reason research girl
guy moment air teacher force education
"""
WORDS = tuple(TEXT.split())


class Prompts:
    """Draws texts. `tokens` has the number of tokens of each word with the space before it."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = tokens
        self._words = list(tokens)
        self._least = min(tokens.values())

    def text(self, draw: random.Random, tokens: int) -> str:
        """Random words, together of `tokens` tokens, or of a few less where no word fits; at least
        one word. A chat template comes on top."""
        words, left = [], tokens
        while left >= self._least:
            for word in draw.choices(self._words, k=left // self._least):
                if self._tokens[word] <= left:
                    words.append(word)
                    left -= self._tokens[word]
        return " ".join(words or draw.choices(self._words))
