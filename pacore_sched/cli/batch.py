"""`python -m pacore_sched batch FILE`: PaCoRe's answers to all questions of a JSONL file.

A line of the file is {"question": ...} or {"messages": [...]}, with "id" and "images" if need be
(answers/questions.py). A line of the output is a problem: its answer, or why there is none, and
every rollout of every round.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from itertools import groupby

from pacore_sched.answers.journal import RolloutResult
from pacore_sched.answers.pacore import Pacore
from pacore_sched.answers.questions import Question
from pacore_sched.answers.rounds import load_template, parse_widths, round_widths
from pacore_sched.cli import options as shared
from pacore_sched.cli.jobs import Job, ProblemResult, add_job_options, run_job, template_digest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("questions", help="JSONL file, a question per line")
    shared.add_pacore_options(parser)
    parser.add_argument(
        "--min-messages",
        type=int,
        help="go on to the next round when so many of a round's rollouts have ended; default: all",
    )
    add_job_options(parser, "a problem")


def run(options: argparse.Namespace) -> int:
    """The `batch` command; 1 if a problem failed, 130 if it was stopped."""
    widths = parse_widths(options.widths)
    template = load_template(options.template) if options.template else None
    settings = {
        "widths": widths,
        "min_messages": options.min_messages,
        "template_sha256": template_digest(options.template),
    }
    pacore = partial(
        Pacore,
        widths=widths,
        seed=options.seed,
        template=template,
        min_messages=options.min_messages,
    )
    width = max(round_widths(widths))
    return run_job(options, options.questions, Job("batch", width, settings, pacore, result_line))


def result_line(
    question: Question, ending: ProblemResult, results: Sequence[RolloutResult]
) -> dict:
    """A problem's line of the output; `results` by round and index."""
    rounds = [list(group) for _, group in groupby(results, lambda result: result.round)]
    return {
        "id": question.id,
        "answer": ending.text,
        "failed": ending.error is not None,
        "error": ending.error,
        "rounds": [
            {
                "prompt_tokens": round_[0].prompt_tokens,
                "rollouts": [
                    {
                        "text": result.text,
                        "tokens": result.num_tokens,
                        "seed": result.seed,
                        "finish_reason": result.finish_reason,
                    }
                    for result in round_
                ],
            }
            for round_ in rounds
        ],
    }
