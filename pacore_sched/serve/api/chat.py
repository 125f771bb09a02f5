"""A request to /v1/chat/completions, from its body to the response.

It is one problem for the engine: a round of `n` rollouts, or with PaCoRe its rounds, of which the
last gives the answer.
"""

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from model.errors import InputError
from model.text.prompt import opens_thinking
from model.vision.image import load_image, preprocess
from pacore_sched.answers.problem_run import Problem, Settings
from pacore_sched.serve.api import pacore
from pacore_sched.serve.api.choices import ChatChoice, rollout_text
from pacore_sched.serve.api.context import Context
from pacore_sched.serve.api.frames import DONE, Frames, failure_frames
from pacore_sched.serve.api.logprobs import TokenTexts
from pacore_sched.serve.api.requests import ChatRequest, ImagePart, Message
from pacore_sched.serve.api.sampling import check_rollouts, sampling_of, seed_of
from pacore_sched.serve.api.usage import Usage
from pacore_sched.serve.errors import ApiError, of_input, refused
from pacore_sched.serve.images import image_source
from pacore_sched.serve.jobs import Ended, Event, Job, NewTokens, RolloutEnded, check_answer
from pacore_sched.serve.saved import Saving

if TYPE_CHECKING:
    from model.vision.image import Views


class ChatAnswer:
    """One request: `submit` it, then read `whole` or `chunks`, and `close` it in the end."""

    def __init__(self, context: Context, body: ChatRequest) -> None:
        """Raises ApiError for a body that is wrong, or beyond a limit."""
        self.context, self.body = context, body
        service = context.service
        self._model, limits = service.model, service.limits
        self.options = pacore.options_of(body, context.names.widths(body.model), limits)
        check_rollouts(body.n, limits, "n")
        self._tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        if body.tool_choice == "none":
            self._tools = []
        if body.tool_choice == "auto" and not self._tools:
            raise refused("tool_choice needs tools", "tool_choice")
        self.problem = self._problem()
        self.settings = self._settings()
        self.usage = Usage(rounds=self.options is not None)
        during = self.usage.during(body)
        self._frames = Frames("chatcmpl", "chat.completion", body.model, during)
        self._texts = TokenTexts(self._model.tokenizer)
        self._logprobs: list[list[dict]] = [[] for _ in range(body.n)]
        self._choices: list[ChatChoice] = []
        self._job: Job | None = None
        self._saving = Saving(self.settings)
        self._closed = threading.Event()

    async def submit(self) -> None:
        """Hand the request to the engine. Raises ApiError if it is refused."""
        self.context.service.check_open()
        saved = self.context.saved
        if self.options and saved and not self._has_remote_images:
            messages = [message.model_dump() for message in self.body.messages]
            self._saving = await saved.open(messages, self.body.seed, self.settings)
        self.settings = self._saving.settings
        stream, known = self.body.stream or self.body.logprobs, self._saving.known
        submit = partial(self.context.service.submit, self.problem, self.settings, stream=stream)
        try:
            try:
                self._job = await submit(known=known)
            except InputError:
                if not known:
                    raise
                self._saving.drop()  # the KV has another size now, and the prompt another length
                self._job = await submit()
        except InputError as error:
            raise of_input(error, "messages") from None
        ids = self._job.run.prompt.ids
        thinking = opens_thinking(ids, self._model.tokenizer)
        self._choices = [
            ChatChoice(
                rollout_text(self._model, self.settings.sampling),
                thinking=thinking,
                tools=bool(self._tools),
            )
            for _ in range(self.settings.widths[-1])
        ]

    def close(self) -> None:
        """End the request, if it has not ended: its client has left, or it failed."""
        self._closed.set()  # images that have not been loaded need not be
        if self._job is not None:
            self.context.service.cancel(self._job)
        self._saving.close(self._job.results if self._job else ())

    async def whole(self) -> dict:
        """The response of a request without `stream`. Raises ApiError if it fails."""
        answer = None
        async for event in self.events():
            self.deltas(event)
            if isinstance(event, Ended):
                answer = event.answer
        assert answer is not None
        choices = [self._choice(index, "message", c.message, c.finish_reason, self._logprobs[index])
                   for index, c in enumerate(self._choices)]  # fmt: skip
        fields = {"usage": self.usage.record()}
        if self.options:
            fields["pacore"] = pacore.summary(answer, texts=self.options.events)
        return self._frames.whole(choices, **fields)

    async def chunks(self) -> AsyncIterator[str]:
        """The frames of a request with `stream`. Raises ApiError if it fails."""
        for index in range(len(self._choices)):
            yield self._chunk(index, {"role": "assistant", "content": ""})
        async for event in self.events():
            if self.options and self.options.events:
                for name, data in pacore.events_of(event, self.settings.widths):
                    yield self._frames.chunk([], name, pacore=data)
            for index, delta, finish_reason, logprobs in self.deltas(event):
                yield self._chunk(index, delta, finish_reason, logprobs)
            if isinstance(event, Ended) and self.options:
                fields = pacore.summary(event.answer, texts=False)
                yield self._frames.chunk([], pacore=fields)
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield self._frames.chunk([], usage=self.usage.record())
        yield DONE

    def failure(self, error: ApiError) -> str:
        """The last frames of a stream that fails."""
        return failure_frames(error.body)

    async def events(self) -> AsyncIterator[Event]:
        """The events of the request, up to Ended. Raises ApiError if it fails."""
        assert self._job is not None
        async for event in self.context.service.events(self._job):
            self.usage.add(event)
            if isinstance(event, Ended):
                # A resumed problem that failed begins at the beginning the next time.
                self._saving.ended = not event.answer.error or bool(self._saving.known)
                check_answer(event.answer)
            yield event

    def deltas(self, event: Event) -> list[tuple[int, dict, str | None, list[dict]]]:
        """What an event adds to the choices: index, delta, finish reason, log-probabilities."""
        last = len(self.settings.widths) - 1
        match event:
            case NewTokens(index, tokens, logprobs, tops):
                entries = self._texts.chat(tokens, logprobs, tops) if self.body.logprobs else []
                self._logprobs[index] += entries
                deltas = self._choices[index].take(event)
                return _spread(index, deltas, None, entries)
            case RolloutEnded(result) if result.round == last and result.finish_reason != "error":
                deltas = self._choices[result.index].end(result)
                return _spread(result.index, deltas, self._choices[result.index].finish_reason, [])
        return []

    def _chunk(
        self,
        index: int,
        delta: dict,
        finish_reason: str | None = None,
        logprobs: list[dict] | None = None,
    ) -> str:
        return self._frames.chunk(
            [self._choice(index, "delta", delta, finish_reason, logprobs or [])]
        )

    def _choice(
        self, index: int, key: str, value: dict, finish_reason: str | None, logprobs: list[dict]
    ) -> dict:
        content = {"content": logprobs} if self.body.logprobs and logprobs else None
        return {"index": index, key: value, "finish_reason": finish_reason, "logprobs": content}

    def _settings(self) -> Settings:
        body, options = self.body, self.options
        limits = body.max_completion_tokens, body.max_tokens
        if None not in limits and limits[0] != limits[1]:
            raise refused("max_tokens and max_completion_tokens differ", "max_tokens")
        if body.top_logprobs and not body.logprobs:
            raise refused("top_logprobs needs logprobs: true", "top_logprobs")
        service = self.context.service
        sampling = sampling_of(
            body,
            self._model.config.sampling,
            service.limits,
            max_tokens=next((limit for limit in limits if limit is not None), None),
            top_logprobs=body.top_logprobs or 0,
        )
        return Settings(
            pacore.widths_of(options, body.n),
            sampling,
            seed_of(body),
            min_messages=options.min_messages if options else None,
            synthesis=options is not None,
        )

    def _problem(self) -> Problem:
        messages: list[dict] = []
        urls: list[tuple[str, str]] = []
        for message in self.body.messages:
            urls += _image_urls(message, f"messages[{len(messages)}].content")
            messages.append(_plain(message))
        if len(urls) > self.context.service.limits.max_images:
            raise refused(
                f"there are {len(urls)} images; at most {self.context.service.limits.max_images}"
                " may be",
                "messages",
            )
        if urls and self._model.config.vision is None:
            raise refused(
                f"{self._model.config.name} takes no images: it is a text-only model", "messages"
            )
        self._has_remote_images = not all(url.startswith("data:") for _, url in urls)
        loader = self.context.service.image_loader

        def load() -> "list[Views]":
            return loader.load(self._views(urls), self._closed.is_set)

        salt = self.body.cache_salt or ""
        return Problem(messages, load if urls else None, tools=self._tools or None, salt=salt)

    def _views(self, urls: list[tuple[str, str]]) -> "Iterator[Callable[[], Views]]":
        """Fetch the images at some URLs, each with its place, one after the other; yields a call
        that decodes each. Both raise ApiError."""
        limits = self.context.service.limits
        for place, url in urls:
            with _usable(place):
                source = image_source(url, self.context.media)
                # Three bytes in four characters of a data URL.
                if isinstance(source, str) and 3 * len(source) // 4 > limits.max_image_bytes:
                    raise InputError(f"it has more than {limits.max_image_bytes:,} bytes")
            yield partial(self._decode, source, place)

    def _decode(self, source: str | bytes, place: str) -> "Views":
        vision, limits = self._model.config.vision, self.context.service.limits
        assert vision is not None
        with _usable(place):
            return preprocess(load_image(source, max_pixels=limits.max_image_pixels), vision)


@contextmanager
def _usable(place: str) -> Iterator[None]:
    """What is wrong with the image at a place of the body becomes an ApiError."""
    try:
        yield
    except InputError as error:
        raise refused(f"the image cannot be used: {error}", place) from None


def _spread(
    index: int, deltas: list[dict], finish_reason: str | None, logprobs: list[dict]
) -> list[tuple[int, dict, str | None, list[dict]]]:
    """One chunk per delta: the last has the finish reason, the first the log-probabilities."""
    if not deltas and not finish_reason and not logprobs:
        return []
    deltas = deltas or [{}]
    last = len(deltas) - 1
    return [
        (index, delta, finish_reason if i == last else None, logprobs if i == 0 else [])
        for i, delta in enumerate(deltas)
    ]


def _plain(message: Message) -> dict:
    """A message as `build_prompt` takes it: images are marks, which come with their views."""
    record = message.model_dump(exclude_none=True)
    for call in record.get("tool_calls") or ():
        function = call["function"]  # models write "" for a function without parameters
        function["arguments"] = function["arguments"].strip() or "{}"
    if not record.get("tool_calls"):
        record.setdefault("content", "")  # of an answer that ended in its reasoning
    if isinstance(record.get("content"), list):
        record["content"] = [
            {"type": "image"} if part["type"] == "image_url" else part for part in record["content"]
        ]
    return record


def _image_urls(message: Message, place: str) -> list[tuple[str, str]]:
    """The URLs of a message's images, each with its place in the body."""
    parts = message.content if isinstance(message.content, list) else []
    return [
        (f"{place}[{index}].image_url.url", part.image_url.url)
        for index, part in enumerate(parts)
        if isinstance(part, ImagePart)
    ]
