"""How much of each message fits into the next round's prompt.

The released client passes messages on whole, and a prompt that outgrows the context fails. Here the
prompt leaves room for an answer: messages that are too long together lose their beginnings, and if
too little of each would be left, some are left out. An unfinished rollout, one that was cut off
while it was still thinking, passes on only the end of its thoughts. The reader is told in brackets.
"""

from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.rounds import compact
from pacore_sched.sched.prefix_tree import PrefixTree

if TYPE_CHECKING:
    from model.text.tokenizer import Tokenizer

UNFINISHED_TOKENS = 512  # of an unfinished rollout; a message has about 900 (report, fig. 4)
MIN_TOKENS = 64  # what is left of a message that is cut
ATTEMPTS = 8  # prompts built to find one that is within 1 % of the limit
CUT, UNFINISHED = "Its beginning is left out.", "It was not finished."


@dataclass(frozen=True)
class FittedPrompt:
    """A prompt that fits. `cut` and `dropped` are the indices of rollouts whose messages have lost
    their beginnings, and of those whose messages are left out."""

    ids: list[int]
    cut: tuple[int, ...]
    dropped: tuple[int, ...]


def fit_messages(
    results: Sequence[RolloutResult],
    build: Callable[[Sequence[str]], list[int]],
    limit: int,
    tokenizer: "Tokenizer",
) -> FittedPrompt:
    """The prompt that `build` makes of one round's messages, with at most `limit` tokens.

    `build` takes a message per rollout, "" for none; without any message the prompt must fit.
    """
    messages = [compact(result.text) for result in results]
    unfinished = {index for index, result in enumerate(results) if _is_unfinished(result)}
    most = [UNFINISHED_TOKENS if i in unfinished else limit for i in range(len(messages))]
    ends = [tail(text, tokens, tokenizer) for text, tokens in zip(messages, most, strict=True)]
    lengths = [tokens for _, tokens in ends]
    best: FittedPrompt | None = None
    low, budget, high = 0, limit, limit + 1  # `low` fits, `high` does not
    for _ in range(ATTEMPTS):
        kept = tokens_kept(lengths, budget, unfinished)
        texts = [
            text if tokens == length else tail(text, tokens, tokenizer)[0]
            for (text, length), tokens in zip(ends, kept, strict=True)
        ]
        cut = {i for i, text in enumerate(texts) if text and text != messages[i]}
        ids = build([_marked(t, i in cut, i in unfinished) for i, t in enumerate(texts)])
        if len(ids) <= limit:
            low = budget
            dropped = (i for i, text in enumerate(texts) if messages[i] and not text)
            best = FittedPrompt(ids, tuple(sorted(cut)), tuple(dropped))
        else:
            high = budget
        guess = limit - (len(ids) - sum(kept))  # if the template adds as much as it did now
        budget = guess if low < guess < high else (low + high) // 2
        if budget == low or 0 <= limit - len(ids) <= limit // 100:
            break
    if best is None:
        dropped = (i for i, message in enumerate(messages) if message)
        best = FittedPrompt(build([""] * len(messages)), (), tuple(dropped))
    return best


def prompt_limit(context: int, tree: PrefixTree, first_prompt: int, max_tokens: int) -> int:
    """The most tokens of a prompt with messages: what `context` and the KV pages of `tree` hold,
    without room for an answer.

    That is room for `max_tokens`, or else for half of what the first round's prompt leaves, one
    token at least: the report's setting has 64K for a rollout in a context of 128K.
    """
    size = tree.page_size
    in_pages = tree.num_pages * size - 3 * (size - 1)  # images, text and rollout start new pages
    capacity = min(context, in_pages)
    return capacity - min(max_tokens, max((capacity - first_prompt) // 2, 1))


def tokens_kept(lengths: Sequence[int], budget: int, unfinished: Collection[int] = ()) -> list[int]:
    """How many of its `lengths[i]` tokens each message keeps; their sum is at most `budget`.

    All are cut to one length, so that the longest lose first. Messages are dropped, and keep 0, if
    the others would keep fewer than MIN_TOKENS: first `unfinished` ones, which conclude nothing,
    then the longest, so that as many as possible are left.
    """
    shortest = [min(length, MIN_TOKENS) for length in lengths]
    rest, need = set(range(len(lengths))), sum(shortest)
    order = sorted(rest, key=lambda i: (i not in unfinished, -lengths[i], i))
    for index in order:
        if need <= budget:
            break
        rest.remove(index)
        need -= shortest[index]
    kept = [lengths[index] for index in rest]
    limits = range(1, max(kept, default=0) + 1)
    limit = bisect_right(limits, budget, key=lambda limit: sum(min(n, limit) for n in kept))
    return [min(length, limit) if i in rest else 0 for i, length in enumerate(lengths)]


def tail(text: str, tokens: int, tokenizer: "Tokenizer") -> tuple[str, int]:
    """The end of `text` that has at most `tokens` tokens, and their number."""
    size = 8 * max(tokens, 1)  # characters that are likely to hold them
    while True:
        ids = tokenizer.encode(text[-size:], special=False)
        if size >= len(text) or len(ids) > tokens:
            break
        size *= 2
    if len(ids) <= tokens:
        return text, len(ids)
    end = b"".join(map(tokenizer.token_bytes, ids[len(ids) - tokens :]))
    return end.decode("utf-8", errors="ignore"), tokens  # without the rest of a cut character


def _is_unfinished(result: RolloutResult) -> bool:
    """Whether a rollout ended before its thoughts did."""
    text = result.text
    return "</think>" not in text and (result.finish_reason == "length" or "<think>" in text)


def _marked(text: str, cut: bool, unfinished: bool) -> str:
    """A message, after a line that says what its reader does not see."""
    marks = [UNFINISHED] * unfinished + [CUT] * cut
    return f"[{' '.join(marks)}]\n{text}" if text and marks else text
