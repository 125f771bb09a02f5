"""Drafts from sibling rollouts: what a sibling wrote after the same few tokens.

When few rollouts are left, a decode step has room for more than one token per rollout. Rollouts of
one prompt often repeat each other, so a draft is what followed the latest occurrence of the
rollout's last tokens in any of them, itself included. The step that verifies the draft samples a
token after every drafted one. This is lossless: a token depends only on its seed, its position and
the logits before it, so a draft is kept up to where it departs from what would have been sampled
anyway.
"""

from dataclasses import dataclass, field

from pacore_sched.sched.request import Group, Rollout

MAX_DRAFT = 8  # tokens of a draft
ORDERS = (3, 2)  # n-gram lengths to match, in this order
CATCH_UP = 512  # tokens indexed per draft: less than a millisecond


@dataclass(slots=True)
class _Index:
    """The n-grams of one group's rollouts: n-gram -> (rollout's tokens, index of what follows).

    An n-gram is entered once a token follows it; later positions replace earlier ones.
    """

    positions: dict[tuple[int, ...], tuple[list[int], int]] = field(default_factory=dict)
    indexed: dict[int, int] = field(default_factory=dict)  # rollout's index -> tokens entered

    def catch_up(self, rollout: Rollout, max_tokens: int) -> int:
        """Enter up to `max_tokens` of a rollout's new tokens; returns their number."""
        tokens = rollout.tokens
        start = self.indexed.get(rollout.index, 0)
        stop = min(len(tokens), start + max_tokens)
        for end in range(start, stop):
            for order in ORDERS:
                if end >= order:
                    self.positions[tuple(tokens[end - order : end])] = tokens, end
        self.indexed[rollout.index] = stop
        return stop - start

    def continuation(self, tokens: list[int], max_tokens: int) -> list[int]:
        """Up to `max_tokens` tokens that followed the latest match of the ending of `tokens`."""
        for order in ORDERS:
            if len(tokens) >= order:
                position = self.positions.get(tuple(tokens[-order:]))
                if position is not None:
                    source, start = position
                    return source[start : start + max_tokens]
        return []


class SiblingDrafts:
    """Drafts for rollouts of any number of groups; their length adapts to how many are accepted."""

    def __init__(self) -> None:
        self._indexes: dict[Group, _Index] = {}
        self._lengths: dict[Rollout, int] = {}

    def draft(self, rollout: Rollout, max_tokens: int) -> tuple[int, ...]:
        """At most `max_tokens` tokens that may come next; () without a match.

        Siblings' new tokens are entered first and the rollout's own last, so that its own latest
        occurrence takes precedence. Many new tokens are entered over several calls.
        """
        index = self._indexes.setdefault(rollout.group, _Index())
        budget = CATCH_UP
        for sibling in (*(r for r in rollout.group.rollouts if r is not rollout), rollout):
            budget -= index.catch_up(sibling, budget)
        max_tokens = min(max_tokens, self._lengths.get(rollout, MAX_DRAFT // 2))
        context = rollout.tokens[-max(ORDERS) :]
        draft: list[int] = []
        while len(draft) < max_tokens:  # a match near its source's end continues from its own draft
            more = index.continuation([*context, *draft], max_tokens - len(draft))
            if not more:
                break
            draft += more
        return tuple(draft)

    def verified(self, rollout: Rollout, drafted: int, accepted: int) -> None:
        """Report how many of `drafted` tokens were accepted. The next draft is longer if all were,
        else one token longer than the accepted part."""
        if drafted:
            length = 2 * drafted if accepted == drafted else accepted + 1
            self._lengths[rollout] = min(length, MAX_DRAFT)

    def forget(self, group: Group) -> None:
        """Drop a group's index and draft lengths."""
        self._indexes.pop(group, None)
        for rollout in group.rollouts:
            self.forget_rollout(rollout)

    def forget_rollout(self, rollout: Rollout) -> None:
        """Drop the draft length of a rollout that leaves its group."""
        self._lengths.pop(rollout, None)
