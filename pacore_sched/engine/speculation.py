"""Drafts for the tail: what a sibling wrote after the same few tokens, guessed to come again.

When few rollouts are left, a decode step has room for more tokens than one per rollout. Rollouts
of one prompt say much the same thing, so the latest place in any of them, the rollout itself
included, where its last tokens stand gives a draft; the step that verifies it draws a token behind
every drafted one. That loses nothing: a token depends on its seed, its position and the logits
before it alone, so a draft is kept up to where it departs from what would have been drawn anyway.
"""

from dataclasses import dataclass, field

from pacore_sched.sched.request import Group, Rollout

LONGEST = 8  # tokens of a draft
ORDERS = (3, 2)  # tokens that must agree for a match; the first that matches decides
CATCH_UP = 512  # tokens entered per draft: less than a millisecond


@dataclass(slots=True)
class _Index:
    """Where the tokens of one group's rollouts have been seen: n-gram -> (rollout, what follows).

    An n-gram is entered once a token follows it, later places replacing earlier ones.
    """

    places: dict[tuple[int, ...], tuple[list[int], int]] = field(default_factory=dict)
    indexed: dict[int, int] = field(default_factory=dict)  # rollout's index -> tokens entered

    def catch_up(self, rollout: Rollout, most: int) -> int:
        """Enter up to `most` of a rollout's tokens that are not in yet; how many they were."""
        tokens = rollout.tokens
        start = self.indexed.get(rollout.index, 0)
        stop = min(len(tokens), start + most)
        for follows in range(start, stop):
            for order in ORDERS:
                if follows >= order:
                    self.places[tuple(tokens[follows - order : follows])] = tokens, follows
        self.indexed[rollout.index] = stop
        return stop - start

    def follow(self, tokens: list[int], most: int) -> list[int]:
        """What followed the last place with the same ending as `tokens`: up to `most` tokens."""
        for order in ORDERS:
            if len(tokens) >= order:
                place = self.places.get(tuple(tokens[-order:]))
                if place is not None:
                    source, start = place
                    return source[start : start + most]
        return []


class SiblingDrafts:
    """Drafts for the rollouts of any groups; lengths adapt to how many tokens proved right."""

    def __init__(self) -> None:
        self._indexes: dict[Group, _Index] = {}
        self._lengths: dict[Rollout, int] = {}

    def draft(self, rollout: Rollout, most: int) -> tuple[int, ...]:
        """At most `most` tokens that may come next; () where nothing matches.

        Tokens that siblings have gained since the last call are entered first, the rollout's own
        last, so that its own latest words decide. Many tokens at once are entered over several
        calls.
        """
        index = self._indexes.setdefault(rollout.group, _Index())
        budget = CATCH_UP
        for sibling in (*(r for r in rollout.group.rollouts if r is not rollout), rollout):
            budget -= index.catch_up(sibling, budget)
        most = min(most, self._lengths.get(rollout, LONGEST // 2))
        context = rollout.tokens[-max(ORDERS) :]
        draft: list[int] = []
        while len(draft) < most:  # a match near its source's end goes on from what it gave
            follows = index.follow([*context, *draft], most - len(draft))
            if not follows:
                break
            draft += follows
        return tuple(draft)

    def verified(self, rollout: Rollout, drafted: int, right: int) -> None:
        """Tell that the first `right` of `drafted` tokens were drawn: the next draft is longer if
        all were, else one token longer than what was right."""
        if drafted:
            length = 2 * drafted if right == drafted else right + 1
            self._lengths[rollout] = min(length, LONGEST)

    def forget(self, group: Group) -> None:
        """Drop all that is known of a group."""
        self._indexes.pop(group, None)
        for rollout in group.rollouts:
            self._lengths.pop(rollout, None)
