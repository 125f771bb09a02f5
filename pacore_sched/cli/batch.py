"""`python -m pacore_sched batch FILE`: answer all questions of a JSONL file with PaCoRe.

A line of the file is {"question": ...} or {"messages": [...]}, optionally with "id" and "images"
(answers/questions.py). A line of the output is a problem: its answer, or why there is none, and
every rollout of every round.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from itertools import groupby

from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.live import Round
from pacore_sched.answers.pacore import Pacore
from pacore_sched.answers.questions import Question
from pacore_sched.answers.rounds import load_template, parse_widths, round_widths
from pacore_sched.cli import options as shared
from pacore_sched.cli.jobs import Job, ProblemResult, add_job_options, run_job, text_digest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("questions", help="JSONL file with one question per line")
    shared.add_pacore_options(parser)
    parser.add_argument(
        "--min-messages",
        type=shared.WIDTH,
        help="start the next round when this many of a round's rollouts have ended; default: all",
    )
    add_job_options(parser, "one problem")


def run(options: argparse.Namespace) -> int:
    """The `batch` command; returns 1 if a problem failed, 130 if the run was stopped."""
    widths = parse_widths(options.widths)
    template = load_template(options.template) if options.template else None
    settings = {
        "widths": widths,
        "min_messages": options.min_messages,
        "template_sha256": text_digest(template.source) if template else None,
    }
    pacore = partial(
        Pacore,
        widths=widths,
        seed=options.seed,
        template=template,
        min_messages=options.min_messages,
    )
    job = Job("batch", round_widths(widths), settings, pacore, result_line)
    return run_job(options, options.questions, job)


def result_line(
    question: Question, result: ProblemResult, rollouts: Sequence[RolloutResult]
) -> dict:
    """A problem's output line; `rollouts` are ordered by round and index."""
    rounds = [Round.of(list(group)) for _, group in groupby(rollouts, lambda r: r.round)]
    return {
        "id": question.id,
        "answer": result.text,
        "failed": result.error is not None,
        "error": result.error,
        "rounds": [round_.record() for round_ in rounds],
    }
