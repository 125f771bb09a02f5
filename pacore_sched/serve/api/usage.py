"""The tokens of a request, as `usage` counts them."""

from pacore_sched.serve.jobs import Event, RolloutEnded, RoundStarted


class Usage:
    """Counts the events of a request's jobs.

    A prompt counts once, whatever `n` is, as OpenAI counts it. In a PaCoRe request (`rounds`), each
    rollout's prompt counts, in every round. What siblings, earlier rounds and earlier requests had
    written is in `cached_tokens`. With `silent`, what is generated is not shown and not counted.
    """

    def __init__(self, *, rounds: bool = False, silent: bool = False) -> None:
        self.rounds, self.silent = rounds, silent
        self.prompt = self.cached = self.completion = 0

    def add(self, event: Event) -> None:
        match event:
            case RoundStarted(started=count, prompt_tokens=tokens, cached_tokens=cached):
                self.prompt += tokens * (count if self.rounds else 1)
                self.cached += cached
                if self.rounds:  # every rollout writes only the prompt's last token itself
                    self.cached += (count - 1) * (tokens - 1)
            case RolloutEnded(result, cached_tokens=cached):
                self.cached += cached
                self.completion += 0 if self.silent else result.num_tokens

    def record(self) -> dict:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }
