"""A request to /v1/completions, from its body to the response: one problem per prompt.

Prompts are texts or token ids, without a chat template; the names of control tokens in a text are
these tokens, as templates written by the client need.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial

from model.errors import ContextError, InputError
from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.problem_run import Problem, Settings
from pacore_sched.engine.step_rows import PromptScores
from pacore_sched.serve.api.choices import rollout_text
from pacore_sched.serve.api.context import Context
from pacore_sched.serve.api.frames import DONE, Frames, failure_frames
from pacore_sched.serve.api.logprobs import TokenTexts
from pacore_sched.serve.api.requests import CompletionRequest
from pacore_sched.serve.api.sampling import check_rollouts, sampling_of, seed_of
from pacore_sched.serve.api.usage import Usage
from pacore_sched.serve.errors import ApiError, of_input, refused
from pacore_sched.serve.jobs import Ended, Event, Job, NewTokens, RolloutEnded, check_answer
from pacore_sched.serve.text.rollout_text import RolloutText

MAX_TOKENS = 16  # OpenAI's default


class CompletionAnswer:
    """One request: `submit` it, then read `whole` or `chunks`, and `close` it in the end."""

    def __init__(self, context: Context, body: CompletionRequest) -> None:
        """Raises ApiError for a body that is wrong, or beyond a limit."""
        self.context, self.body = context, body
        service = context.service
        self._model, limits = service.model, service.limits
        if context.names.widths(body.model) is not None:
            raise refused("PaCoRe needs messages: use /v1/chat/completions", "model")
        self.prompts = _prompts(body)
        if len(self.prompts) > limits.max_waiting:
            raise refused(f"at most {limits.max_waiting} prompts may wait", "prompt")
        check_rollouts(body.n, limits, "n")
        max_tokens = MAX_TOKENS if body.max_tokens is None else body.max_tokens
        if not max_tokens and not body.echo:
            raise refused("max_tokens may be 0 only with echo", "max_tokens")
        sampling = sampling_of(
            body,
            self._model.config.sampling,
            limits,
            max_tokens=max(max_tokens, 1),
            top_logprobs=body.logprobs or 0,
        )
        self.settings = Settings((body.n,), sampling, seed_of(body), synthesis=False)
        self.usage = Usage(silent=not max_tokens)
        self._frames = Frames("cmpl", "text_completion", body.model, self.usage.during(body))
        self._jobs: list[Job] = []
        self._choices: list[_Choice] = []

    async def submit(self) -> None:
        """Hand all prompts to the engine. Raises ApiError if one is refused."""
        self.context.service.check_open(len(self.prompts))
        top = self.body.logprobs if self.body.echo else None
        stream = self.body.stream or self.body.logprobs is not None
        for prompt in self.prompts:
            try:
                ids = await self.context.service.text_thread(partial(self._ids, prompt))
                scores = None if top is None else PromptScores(ids[-1], top)
                salt = self.body.cache_salt or ""
                problem = Problem((), ids=ids, scores=scores, salt=salt)
                job = await self.context.service.submit(problem, self.settings, stream=stream)
            except InputError as error:
                raise of_input(error, "prompt") from None
            self._jobs.append(job)
            text = prompt if isinstance(prompt, str) else self._model.tokenizer.decode(ids)
            self._choices += [_Choice(self, ids, text, scores) for _ in range(self.body.n)]

    def close(self) -> None:
        """End the request, if it has not ended: its client has left, or it failed."""
        for job in self._jobs:
            self.context.service.cancel(job)

    async def whole(self) -> dict:
        """The response of a request without `stream`. Raises ApiError if it fails."""
        async for number, event in self._events():
            self._parts(number, event)
        choices = [choice.whole(index) for index, choice in enumerate(self._choices)]
        return self._frames.whole(choices, usage=self.usage.record())

    async def chunks(self) -> AsyncIterator[str]:
        """The frames of a request with `stream`. Raises ApiError if it fails."""
        async for number, event in self._events():
            for part in self._parts(number, event):
                yield self._frames.chunk([part])
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield self._frames.chunk([], usage=self.usage.record())
        yield DONE

    def failure(self, error: ApiError) -> str:
        """The last frames of a stream that fails."""
        return failure_frames(error.body)

    def _parts(self, number: int, event: Event) -> list[dict]:
        """What an event of prompt `number` adds to the choices."""
        match event:
            case NewTokens(index):
                index += number * self.body.n
                return [self._choices[index].take(index, event)]
            case RolloutEnded(result) if result.finish_reason != "error":
                index = number * self.body.n + result.index
                return [self._choices[index].end(index, result)]
        return []

    async def _events(self) -> AsyncIterator[tuple[int, Event]]:
        """The events of all prompts, each with the prompt's number."""
        merged: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue()

        async def read(number: int, job: Job) -> None:
            try:
                async for event in self.context.service.events(job):
                    merged.put_nowait((number, event))
            except Exception as error:
                merged.put_nowait((number, error))

        tasks = [asyncio.create_task(read(*item)) for item in enumerate(self._jobs)]
        try:
            left = len(tasks)
            while left:
                number, event = await merged.get()
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Ended):
                    left -= 1
                    check_answer(event.answer)
                self.usage.add(event)
                yield number, event
        finally:
            for task in tasks:
                task.cancel()

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        """A prompt's tokens; in a thread. Raises InputError."""
        config, tokenizer = self._model.config, self._model.tokenizer
        context = config.decoder.max_positions
        if isinstance(prompt, str):
            fewest = tokenizer.fewest_tokens(prompt)
            ids = tokenizer.encode(prompt) if fewest <= context else [0] * fewest
        else:
            ids = list(prompt)
        if not ids:
            raise InputError("a prompt is empty: it needs at least one token")
        if len(ids) >= context:
            raise ContextError(f"a prompt has {len(ids)} tokens or more, the context is {context}")
        if max(ids) >= config.decoder.vocab_size:
            raise InputError(f"token {max(ids)} is not in [0, {config.decoder.vocab_size})")
        if config.vision and config.tokens.im_patch in ids:
            raise InputError("images are given in messages: use /v1/chat/completions")
        return ids


class _Choice:
    """A choice: a rollout's text, after its prompt if that is echoed, and its log-probabilities."""

    def __init__(
        self, answer: CompletionAnswer, ids: list[int], text: str, scores: PromptScores | None
    ) -> None:
        self._body = body = answer.body
        model, sampling = answer._model, answer.settings.sampling
        self._texts = TokenTexts(model.tokenizer)
        self._stream = rollout_text(model, sampling)
        self._echo, self._echoed = text if body.echo else "", False
        self._start = len(self._echo)  # of the generated text
        self._prompt, self._scores = ids, scores
        self._silent = body.max_tokens == 0
        self._parts: list[dict] = []
        self._taken = 0  # tokens

    def take(self, index: int, new: NewTokens) -> dict:
        """What new tokens add."""
        text = self._stream.push(new.tokens)
        return self._part(index, text, new)

    def end(self, index: int, result: RolloutResult) -> dict:
        """What the end adds."""
        reason = "length" if self._silent else result.finish_reason
        return self._part(index, self._stream.finish(result.text), None, reason)

    def whole(self, index: int) -> dict:
        """The choice of a response without `stream`: all its parts."""
        logprobs: dict[str, list] | None = None
        for part in self._parts:
            if part["logprobs"] is None:
                continue
            if logprobs is None:
                logprobs = {key: list(values or ()) for key, values in part["logprobs"].items()}
            else:
                for key, values in part["logprobs"].items():
                    logprobs[key] += values or ()
        if logprobs is not None and not self._body.logprobs:
            logprobs["top_logprobs"] = None  # type: ignore[assignment]
        text = "".join(part["text"] for part in self._parts)
        return self._parts[-1] | {"text": text, "logprobs": logprobs}

    def _part(
        self, index: int, text: str, new: NewTokens | None, finish_reason: str | None = None
    ) -> dict:
        first, self._echoed = not self._echoed, True
        text = self._echo * first + ("" if self._silent else text)
        part = {"index": index, "text": text, "logprobs": None, "finish_reason": finish_reason}
        if new is not None and self._body.logprobs is not None:
            part["logprobs"] = self._logprobs(new, echoed=first)
        self._parts.append(part)
        return part

    def _logprobs(self, new: NewTokens, *, echoed: bool) -> dict:
        """The log-probabilities of new tokens, after those of the prompt that is echoed now."""
        ids: list[int] = []
        logprobs: list[float | None] = []
        tops: list = []
        offsets: list[int] = []
        if echoed and self._scores:
            ids, logprobs = list(self._prompt), list(self._scores.logprobs)
            tops = list(self._scores.top_logprobs)
            prompt = RolloutText(self._texts.bytes)  # a text has the names of control tokens
            prompt.push(ids)
            offsets = list(prompt.offsets)
        if not self._silent:
            ids, logprobs = [*ids, *new.tokens], [*logprobs, *new.logprobs]
            tops += new.top_logprobs
            offsets += [self._start + offset for offset in self._stream.offsets[self._taken :]]
        self._taken += len(new.tokens)
        # OpenAI's lists have the token itself even where it is not among the most likely ones.
        pairs = zip(ids, logprobs, tops, strict=False)
        tops = [None if p is None else [*(t or ()), (i, p)] for i, p, t in pairs]
        return self._texts.completion(ids, logprobs, tops, offsets)


def _prompts(body: CompletionRequest) -> list[str] | list[list[int]]:
    """The prompts of a request. Raises ApiError if there are none."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise refused("prompt is empty", "prompt")
    return [prompt] if isinstance(prompt[0], int) else prompt  # type: ignore[return-value,list-item]
