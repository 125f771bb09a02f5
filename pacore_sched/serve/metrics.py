"""The server's metrics, named as vLLM's with the prefix `pacore:` (docs/server.md has a table).

What the engine counts anyway is in engine_metrics.py.
"""

import time

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.live import Answer
from pacore_sched.serve.jobs import Job

PREFIX = "pacore"
# vLLM's buckets: from a token of a small batch to an answer of minutes.
TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20,
           40, 80)  # fmt: skip
FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5,
                 10, 20, 40, 80, 160, 640, 2560)  # fmt: skip
REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960,
             1920, 7680)  # fmt: skip
TOKENS = tuple(leading * 10**power for power in range(6) for leading in (1, 2, 5))
ROLLOUTS = (1, 2, 4, 8, 16, 17, 32, 37, 64, 128, 256)


class Metrics:
    """All metrics of one server. Methods may be called from any thread."""

    def __init__(self, model: str) -> None:
        """`model` is the name under which it is served."""
        self.registry = CollectorRegistry()
        self.labels = {"model_name": model}
        names = tuple(self.labels)

        def histogram(name: str, help: str, buckets: tuple) -> Histogram:
            metric = Histogram(
                f"{PREFIX}:{name}", help, names, buckets=buckets, registry=self.registry
            )
            return metric.labels(**self.labels)

        def counter(name: str, help: str, *labels: str) -> Counter:
            metric = Counter(f"{PREFIX}:{name}", help, (*names, *labels), registry=self.registry)
            return metric if labels else metric.labels(**self.labels)

        self._first_token = histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", FIRST_TOKEN_S
        )
        self._next_tokens = histogram(
            "inter_token_latency_seconds",
            "Between steps in which a request receives tokens.",
            TOKEN_S,
        )
        self._per_token = histogram(
            "request_time_per_output_token_seconds",
            "A request's mean time between steps in which it receives tokens.",
            TOKEN_S,
        )
        self._latency = histogram(
            "e2e_request_latency_seconds", "From arrival to the end.", REQUEST_S
        )
        self._queue = histogram(
            "request_queue_time_seconds", "From arrival to the first prefilled token.", REQUEST_S
        )
        self._prompt_length = histogram(
            "request_prompt_tokens", "Tokens of a request's first prompt.", TOKENS
        )
        self._generated_length = histogram(
            "request_generation_tokens", "Tokens that a request generated.", TOKENS
        )
        self._rollouts_per_problem = histogram(
            "rollouts_per_problem", "Rollouts of a request, over all its rounds.", ROLLOUTS
        )
        self._prompt_tokens = counter(
            "prompt_tokens", "Prompt tokens, counted for every rollout that read them."
        )
        self._rounds = counter("rounds", "Rounds that ended.")
        self._rollouts = counter("rollouts", "Rollouts that ended.", "finish_reason")
        self._success = counter("request_success", "Requests that ended.", "finished_reason")
        self._cancelled = counter(
            "requests_cancelled", "Requests whose client left, or that were ended."
        )
        self.refused = counter("requests_refused", "Requests refused because too many waited.")
        self._restarts = counter(
            "engine_restarts", "Failed steps after which the engine was reset."
        )

    def text(self) -> bytes:
        """All metrics, as Prometheus reads them."""
        return generate_latest(self.registry)

    def started(self, job: Job) -> None:
        if job.started is not None:
            self._queue.observe(job.started - job.arrived)

    def first_token(self, job: Job) -> None:
        if job.first_token is not None:
            self._first_token.observe(job.first_token - job.arrived)

    def next_tokens(self, seconds: float) -> None:
        self._next_tokens.observe(seconds)

    def rollout_ended(self, result: RolloutResult) -> None:
        self._rollouts.labels(**self.labels, finish_reason=result.finish_reason).inc()
        self._prompt_tokens.inc(result.prompt_tokens)

    def ended(self, job: Job, answer: Answer) -> None:
        self._latency.observe(time.monotonic() - job.arrived)
        if job.first_token is not None and job.last_token is not None and job.steps > 1:
            self._per_token.observe((job.last_token - job.first_token) / (job.steps - 1))
        rollouts = [rollout for round_ in answer.rounds for rollout in round_.rollouts]
        reason = "error" if answer.error else rollouts[-1].finish_reason
        self._success.labels(**self.labels, finished_reason=reason).inc()
        self._rounds.inc(len(answer.rounds))
        if rollouts:
            self._prompt_length.observe(rollouts[0].prompt_tokens)
            self._generated_length.observe(sum(rollout.num_tokens for rollout in rollouts))
            self._rollouts_per_problem.observe(len(rollouts))

    def cancelled(self) -> None:
        self._cancelled.inc()

    def restarted(self) -> None:
        self._restarts.inc()
