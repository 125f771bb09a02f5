"""`python -m pacore_sched sample FILE`: draw n samples for every prompt of a JSONL file.

The groups are for reinforcement learning: token ids, each with its log-probability, under the
distribution that it was drawn from unless --logprobs is raw. The file has the format of `batch`; a
line of the output is a prompt with its samples.
"""

import argparse
from collections.abc import Sequence
from functools import partial

from kernels.sampling import LOGPROBS
from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.pacore import Pacore
from pacore_sched.answers.questions import Question
from pacore_sched.cli.jobs import Job, ProblemResult, add_job_options, run_job
from pacore_sched.cli.options import WIDTH


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", help="JSONL file with one prompt per line")
    parser.add_argument("--n", type=WIDTH, default=8, help="samples per prompt (default: 8)")
    parser.add_argument(
        "--logprobs",
        choices=LOGPROBS,
        default="processed",
        help="processed: after temperature, top-k and top-p, renormalised, as the denominator of an"
        " importance ratio; raw: of the model's own distribution, before them; equal at temperature"
        " 1, top-k 0 and top-p 1 (default: processed)",
    )
    add_job_options(parser, "one prompt with its samples")


def run(options: argparse.Namespace) -> int:
    """The `sample` command; returns 1 if a prompt failed, 130 if the run was stopped."""
    pacore = partial(Pacore, widths=[options.n], seed=options.seed, synthesis=False)
    job = Job(
        "sample",
        [options.n],
        {"n": options.n},
        pacore,
        result_line,
        keep_tokens=True,
        logprobs=options.logprobs,
    )
    return run_job(options, options.prompts, job)


def result_line(
    question: Question, result: ProblemResult, rollouts: Sequence[RolloutResult]
) -> dict:
    """A prompt's output line; `rollouts` are ordered by index.

    A sample's `logprobs` has the natural logarithm of each token's probability. "processed": at the
    temperature, among the tokens that top-k and top-p kept; 0 if it was the only one, as always at
    temperature 0. "raw": in the softmax of the logits. Both are equal at temperature 1, top-k 0 and
    top-p 1.
    """
    return {
        "id": question.id,
        "failed": result.error is not None,
        "error": result.error,
        "prompt_tokens": rollouts[0].prompt_tokens if rollouts else None,
        "samples": [
            {
                "text": rollout.text,
                "tokens": list(rollout.tokens),
                "logprobs": list(rollout.logprobs),
                "seed": rollout.seed,
                "finish_reason": rollout.finish_reason,
            }
            for rollout in rollouts
        ],
    }
