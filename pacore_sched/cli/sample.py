"""`python -m pacore_sched sample FILE`: n samples for every prompt of a JSONL file.

Groups as reinforcement learning wants them: token ids and the log-probability of each under the
distribution that it was drawn from. The file is as for `batch`; a line of the output is a prompt
with its samples.
"""

import argparse
from collections.abc import Sequence
from functools import partial

from model.errors import InputError
from pacore_sched.answers.journal import RolloutResult
from pacore_sched.answers.pacore import Pacore
from pacore_sched.answers.questions import Question
from pacore_sched.cli.jobs import Job, ProblemResult, add_job_options, run_job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", help="JSONL file, a prompt per line")
    parser.add_argument("--n", type=int, default=8, help="samples per prompt")
    add_job_options(parser, "a prompt with its samples")


def run(options: argparse.Namespace) -> int:
    """The `sample` command; 1 if a prompt failed, 130 if it was stopped."""
    if options.n < 1:
        raise InputError("--n must be at least 1")
    pacore = partial(Pacore, widths=[options.n], seed=options.seed, synthesis=False)
    job = Job("sample", options.n, {"n": options.n}, pacore, result_line, keep_tokens=True)
    return run_job(options, options.prompts, job)


def result_line(
    question: Question, ending: ProblemResult, results: Sequence[RolloutResult]
) -> dict:
    """A prompt's line of the output; `results` by index."""
    return {
        "id": question.id,
        "failed": ending.error is not None,
        "error": ending.error,
        "prompt_tokens": results[0].prompt_tokens if results else None,
        "samples": [
            {
                "text": result.text,
                "tokens": list(result.tokens),
                "logprobs": list(result.logprobs),
                "seed": result.seed,
                "finish_reason": result.finish_reason,
            }
            for result in results
        ],
    }
