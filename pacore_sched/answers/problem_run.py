"""The state of one problem between rounds: finished rounds, and the next round's prompt.

A round is an entry of `Settings.widths`. It ends when as many of its rollouts have ended as
`Settings.need` says; the others are cancelled and have no message.
"""

import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from kernels.runtime.spans import begin
from model.errors import ContextError, InputError, reason
from model.text.prompt import build_prompt, image_head_length, num_characters
from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.message_budget import FittedPrompt, fit_messages, prompt_limit
from pacore_sched.answers.rounds import SynthesisTemplate, last_user_message, round_messages
from pacore_sched.engine.engine import Engine
from pacore_sched.sched.request import Group, Partial, Rollout, Sampling, Segment

if TYPE_CHECKING:
    from model.step3vl import Step3VL
    from model.vision.image import Views
    from pacore_sched.engine.executor import ModelExecutor
    from pacore_sched.engine.image_encoder import Features
    from pacore_sched.engine.step_rows import PromptScores

QUICK = 100_000  # characters: about 0.1 s of tokenising


@dataclass(frozen=True)
class Problem:
    """A conversation to be answered.

    A non-empty `id` is part of the rollouts' seeds. `load` returns the images of the conversation's
    image parts, in order; it is called once, in another thread. What it raises is the problem's
    error. `tools` are OpenAI-style definitions, which every round's prompt has. KV is shared only
    with problems that have the same `salt`.
    """

    messages: Sequence[dict]
    load: "Callable[[], Sequence[Views]] | None" = None
    id: str = ""
    ids: Sequence[int] = ()
    scores: "PromptScores | None" = None
    tools: Sequence[Mapping] | None = None
    salt: str = ""


@dataclass(frozen=True)
class Settings:
    """How problems are answered; `widths` has the rollouts of every round.

    min_messages: a round ends when this many of its rollouts have ended; None: all
    synthesis: whether the last round is the synthesis, whose message is the answer
    """

    widths: Sequence[int]
    sampling: Sampling
    seed: int = 0
    template: SynthesisTemplate | None = None
    min_messages: int | None = None
    synthesis: bool = True

    def need(self, number: int) -> int:
        """The rollouts of a round that must end."""
        width = self.widths[number]
        return min(self.min_messages or width, width)


@dataclass(frozen=True)
class Part:
    """Rollouts of one round that have moved here from another engine: index -> what they have
    generated. The problem's rounds go on over there."""

    round: int
    rollouts: Mapping[int, Partial]


@dataclass(frozen=True)
class _Layout:
    """The part of an image that its prompt tokens depend on; the pixels are not kept."""

    newlines: tuple[bool, ...]


class ProblemRun:
    """A problem and its progress. `rounds` holds the finished rounds, each its results by index."""

    def __init__(
        self,
        model: "Step3VL",
        engine: "Engine[ModelExecutor]",
        settings: Settings,
        problem: Problem,
        number: int,
        known: Iterable[RolloutResult] = (),
        part: Part | None = None,
        neighbour: "ProblemRun | None" = None,
    ) -> None:
        """`number` counts problems in order of arrival; `known` are results of an earlier run.

        With `part`, only these rollouts are run; `known` are then those of all earlier rounds. Its
        `neighbour` has other rollouts of this round on the engine: they share the prompt's KV.
        """
        self.id, self.number = problem.id, number
        self.rounds: list[list[RolloutResult]] = []
        self.group: Group | None = None  # of the current round, or of the last one
        self.pending = 0  # rollouts of the current round that have not ended, here or elsewhere
        self._model, self._engine, self.settings = model, engine, settings
        self._messages, self._load = problem.messages, problem.load
        self._ids, self._scores = problem.ids, problem.scores
        self._tools, self._salt = problem.tools, problem.salt
        self.image_bytes = 0  # of the images' embeddings, from `prepare` to `release`
        self._preparing: Future | None = None
        self._views: Sequence[Views] = ()  # until they are encoded
        self._pixel_bytes = 0
        self._layouts: list[_Layout] = []
        self._features: Features | None = None
        self._failure: str | None = None
        self._head: Segment | None = None
        self._head_ids: list[int] = []
        self.prompt = FittedPrompt([], (), ())  # of the current round
        self._known = {(result.round, result.index): result for result in known}
        self._current: dict[int, RolloutResult] = {}
        self._part, self._neighbour = part, neighbour
        self._away: set[int] = set()  # rollouts of the current round that are on other engines
        self._on_end = ExitStack()  # closes the current round's span
        self._begin_round()

    @property
    def finished(self) -> bool:
        """Whether all rounds have ended, or with a part, its round."""
        last = self._part.round + 1 if self._part else len(self.settings.widths)
        return len(self.rounds) == last

    @property
    def quick(self) -> bool:
        """Whether `prepare` takes no longer than a step: without images, and for short messages."""
        return not self._load and num_characters(self._messages, self._tools) <= QUICK

    @property
    def pixel_bytes(self) -> int:
        """Bytes of its images' pixels in memory: from `prepare` until they are encoded."""
        features = self._features  # `release` may run in another thread
        if features is not None and not features.waiting:
            self._pixel_bytes = 0  # this is asked often
        return self._pixel_bytes

    @property
    def error(self) -> str | None:
        """Why the current round will never end: its images could not be encoded, or `fail`."""
        if self._failure or self._features is None:
            return self._failure
        error = self._features.error
        return f"the images cannot be encoded: {reason(error)}" if error else None

    @property
    def results(self) -> list[RolloutResult]:
        """The rollouts that have ended so far, in the order of their rounds and indices."""
        current = [self._current[index] for index in sorted(self._current)]
        return [*(result for round_ in self.rounds for result in round_), *current]

    def fail(self, error: BaseException) -> None:
        """Make `error` the problem's error."""
        self._failure = reason(error)

    def prepare(self) -> None:
        """Load the images and build the first prompt; may run in another thread.

        Raises InputError if they are invalid or can never fit, and whatever `Problem.load` raises.
        """
        self._views = self._load() if self._load else ()
        if self._views:
            self.image_bytes = self._engine.executor.feature_bytes(self._views)
            self._pixel_bytes = sum(view.nbytes for image in self._views for view in image.all)
        self._layouts = [_Layout(view.newlines) for view in self._views]
        self.prompt = self._build_prompt()

    def set_preparing(self, preparing: Future) -> None:
        """Set the future of `prepare`: `next_round` waits for it and raises its error."""
        self._preparing = preparing

    def next_round(self) -> Group | None:
        """Submit the missing rollouts of the current round; None if no round is left.

        Raises InputError if the prompt is invalid or can never fit, and whatever `prepare` raised.
        """
        if self.finished:
            return None
        if self._preparing is not None:
            self._preparing.result()
            self._preparing = None
        else:
            self.prompt = self._build_prompt()
        number, settings = len(self.rounds), self.settings
        if self._part and self._part.round != number:
            raise RuntimeError(f"a part of round {self._part.round} without the rounds before it")
        path = self._neighbours_path()
        if path:
            self._views, self._load, self.image_bytes, self._pixel_bytes = (), None, 0, 0
        else:
            self._encode()
            path = self._path(self.prompt.ids)
        width = settings.widths[number]
        partial = self._part.rollouts if self._part else dict.fromkeys(range(width), Partial())
        missing = [index for index in partial if index not in self._current]
        self._on_end.callback(begin("round", f"{number} of problem {self.id or self.number}"))
        self.group = self._engine.submit(
            path,
            self.prompt.ids[-1],
            {i: rollout_seed(settings.seed, number, i, self.id) for i in missing},
            self._sampling(path),
            problem=self.number,
            round=number,
            need=len(missing) if self._part else settings.need(number) - self._ended(),
            partial=partial,
        )
        self.pending = len(missing)
        return self.group

    def take(self, rollout: Rollout) -> RolloutResult:
        """Record that a rollout of the current round has ended. Raises whatever turning its tokens
        into text raises."""
        finish_reason = rollout.finish_reason
        assert finish_reason is not None
        has_message = finish_reason in ("stop", "length")
        result = RolloutResult(
            problem=self.id,
            round=len(self.rounds),
            index=rollout.index,
            seed=rollout.seed,
            prompt_tokens=rollout.group.prompt_tokens,
            finish_reason=finish_reason,
            text=self._engine.text(rollout) if has_message else "",
            num_tokens=len(rollout.tokens),
            logprob=sum(rollout.logprobs),
            cut=self.prompt.cut,
            dropped=self.prompt.dropped,
            tokens=tuple(rollout.tokens),
            logprobs=tuple(rollout.logprobs),
        )
        self._record(result)
        return result

    def detach(self, indices: Collection[int]) -> dict[int, Partial]:
        """Remove those of the current round's rollouts that have not ended, to go on elsewhere as a
        Part; returns what they have generated. The round waits for `take_elsewhere`, unless this is
        itself a part, which has only fewer `pending` rollouts then."""
        assert self.group is not None
        leaving = [r for r in self.group.rollouts if r.index in indices and not r.finish_reason]
        partials = {rollout.index: self._engine.detach(rollout) for rollout in leaving}
        if not self._part:
            self._away.update(partials)
            return partials
        for _ in partials:
            self._engine.ended_elsewhere(self.group)
        self.pending -= len(partials)
        return partials

    def awaits(self, result: RolloutResult) -> bool:
        """Whether it is that of a detached rollout of the current round."""
        return result.round == len(self.rounds) and result.index in self._away

    def take_elsewhere(self, result: RolloutResult) -> list[Rollout]:
        """Record that a detached rollout, which it `awaits`, has ended; returns the rollouts that
        are cancelled as a result, to be taken."""
        assert self.group is not None
        self._away.remove(result.index)
        cancelled = self._engine.ended_elsewhere(self.group)
        self._record(result)
        return cancelled

    def _record(self, result: RolloutResult) -> None:
        """Enter a result of the current round; end the round if it was the last."""
        self._current[result.index] = result
        self.pending -= 1
        if not self._part and self._ended() >= self.settings.need(len(self.rounds)):
            self.pending -= len(self._away)  # they are cancelled
            self._away.clear()
        if not self.pending:
            assert self.group is not None
            self.group.rollouts.clear()  # which refer to the group: this ends the cycle
            self._on_end.close()
            self._end_round()

    def release(self) -> None:
        """Release the KV and image features that are kept between rounds, and the images that wait
        to be encoded."""
        features, head = self._features, self._head
        self._head = self._features = self.group = None
        if features is not None:
            features.release()
        if head is not None:
            self._engine.scheduler.drop(head)
        self._preparing = None  # if it failed, its traceback refers to this object
        self._views, self.image_bytes, self._pixel_bytes = (), 0, 0
        self._on_end.close()

    def _begin_round(self) -> None:
        """Start the current round from known results; end it at once if they are enough."""
        number = len(self.rounds)
        if not self.finished:
            known = (self._known.get((number, i)) for i in range(self.settings.widths[number]))
            self._current = {result.index: result for result in known if result}
            if self._ended() >= self.settings.need(number):
                self._end_round()

    def _end_round(self) -> None:
        """Close the current round; rollouts without a result count as cancelled."""
        number, settings = len(self.rounds), self.settings
        sibling = next(iter(self._current.values()))
        cancelled = replace(
            sibling, finish_reason="cancelled", text="", num_tokens=0, logprob=0.0,
            tokens=(), logprobs=(),
        )  # fmt: skip
        self.rounds.append(
            [
                self._current.get(index)
                or replace(
                    cancelled,
                    index=index,
                    seed=rollout_seed(settings.seed, number, index, self.id),
                )
                for index in range(settings.widths[number])
            ]
        )
        self._begin_round()

    def _ended(self) -> int:
        """The number of rollouts of the current round that ended without being cancelled."""
        return sum(result.finish_reason != "cancelled" for result in self._current.values())

    def _neighbours_path(self) -> Sequence[Segment]:
        """The prompt's segments, if the neighbour's group is still there."""
        group, self._neighbour = self._neighbour and self._neighbour.group, None
        return group.path if group in self._engine.scheduler.groups else ()

    def _encode(self) -> None:
        """Encode the images on the first call; afterwards only their layout is needed."""
        if self._load:
            views, self._views, self._load = self._views, (), None  # the pixels are not kept
            self._features = self._engine.executor.encode(views, self._salt)

    def _build_prompt(self) -> FittedPrompt:
        """The current round's prompt. Raises InputError for a question that fills the context, or
        if known rollouts had another prompt."""
        context = self._model.config.decoder.max_positions
        if not self.rounds:
            if len(self.settings.widths) > 1:  # refuse now what later rounds would
                last_user_message(self._messages)
            ids = list(self._ids) or self._ids_of(self._messages, max_tokens=context)
            if len(ids) >= context:
                raise ContextError(f"the prompt has {len(ids)} tokens, the context is {context}")
            return FittedPrompt(ids, (), ())
        template, first = self.settings.template, self.rounds[0][0].prompt_tokens
        max_tokens = self.settings.sampling.max_tokens
        prompt = fit_messages(
            self.rounds[-1],
            lambda texts: self._ids_of(round_messages(self._messages, texts, template=template)),
            prompt_limit(context, self._engine.scheduler.tree, first, max_tokens),
            self._model.tokenizer,
        )
        for known in self._current.values():
            if known.prompt_tokens != len(prompt.ids):
                raise InputError(
                    f"the prompt of round {len(self.rounds) + 1} has {len(prompt.ids)} tokens, but"
                    f" had {known.prompt_tokens} in the run that is resumed, with room for another"
                    " number of KV tokens: resume with the same --kv-tokens"
                )
        return prompt

    def _ids_of(self, messages: Sequence[dict], max_tokens: int | None = None) -> list[int]:
        model = self._model
        return build_prompt(
            messages,
            model.tokenizer,
            model.config,
            self._layouts,
            tools=self._tools,
            max_tokens=max_tokens,
        )

    def _path(self, ids: list[int]) -> list[Segment]:
        """The prompt's segments without its last token: the leading images, then the rest."""
        tokens = self._model.config.tokens
        segment = partial(self._engine.executor.segment, salt=self._salt)
        if self._features is None:
            return [segment(ids[:-1], scores=None if self.rounds else self._scores)]
        if self._head is None:
            head = image_head_length(ids, self._model.tokenizer, tokens)
            self._head_ids = ids[:head]
            self._head = segment(ids[:head], self._features)
            self._engine.scheduler.keep(self._head)
        head = len(self._head_ids)
        if ids[:head] != self._head_ids:  # the chat template changed the earlier turns
            return [segment(ids[:-1], self._features)]
        first_patch = self._head_ids.count(tokens.im_patch)
        return [self._head, segment(ids[head:-1], self._features, first_patch)]

    def _sampling(self, path: Sequence[Segment]) -> Sampling:
        """The sampling options, with max_tokens limited to the rest of the context.

        After the first round, also to the rest of the KV: the rollouts so far are not lost.
        """
        sampling, context = self.settings.sampling, self._model.config.decoder.max_positions
        prompt_tokens = sum(segment.tokens for segment in path) + 1
        limit = min(sampling.max_tokens, context - prompt_tokens)
        if self.rounds:
            limit = min(limit, self._engine.scheduler.max_tokens(path))
        return replace(sampling, max_tokens=limit)


def rollout_seed(seed: int, number: int, index: int, problem: str = "") -> int:
    """The seed of rollout `index` in round `number`. It does not depend on the widths or on other
    problems, and differs between problems with different ids."""
    name = f"{seed}/{number}/{index}"
    return random.Random(f"{name}/{problem}" if problem else name).getrandbits(63)
