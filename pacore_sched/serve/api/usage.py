"""The tokens of a request, as `usage` counts them."""

from collections.abc import Callable

from pacore_sched.serve.api.requests import Generation
from pacore_sched.serve.jobs import Event, NewTokens, RolloutEnded, RoundStarted


class Usage:
    """Counts the events of a request's jobs.

    A prompt counts once, whatever `n` is, as OpenAI counts it. In a PaCoRe request (`rounds`), each
    rollout's prompt counts, in every round. What siblings, earlier rounds and earlier requests had
    written is in `cached_tokens`. With `silent`, what is generated is not shown and not counted.
    """

    def __init__(self, *, rounds: bool = False, silent: bool = False) -> None:
        self.rounds, self.silent = rounds, silent
        self.prompt = self.cached = self.completion = 0
        self._streamed = 0  # tokens of rollouts that have not ended

    def add(self, event: Event) -> None:
        match event:
            case RoundStarted(started=count, prompt_tokens=tokens, cached_tokens=cached):
                self.prompt += tokens * (count if self.rounds else 1)
                self.cached += cached
                if self.rounds:  # every rollout writes only the prompt's last token itself
                    self.cached += (count - 1) * (tokens - 1)
            case NewTokens(_, tokens) if not self.silent:
                self._streamed += len(tokens)
            case RolloutEnded(result, cached_tokens=cached):
                self.cached += cached
                if not self.silent:
                    self.completion += result.num_tokens
                    self._streamed = max(0, self._streamed - result.num_tokens)

    def during(self, body: Generation) -> Callable[[], dict] | None:
        """`record` if every chunk of the stream is to have the usage so far."""
        options = body.stream_options
        wanted = options and options.include_usage and options.continuous_usage_stats
        return self.record if wanted else None

    def record(self) -> dict:
        """The tokens so far; in the middle of a stream, with those of rollouts that go on."""
        completion = self.completion + self._streamed
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": completion,
            "total_tokens": self.prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }
