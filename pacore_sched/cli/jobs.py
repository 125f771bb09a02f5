"""The run from a question file to a results file that `batch` and `sample` share.

During the run, finished rollouts are in the journal next to the output (answers/journal.py), a
JSONL file that can be read at any time. The output is written from the journal at the end, in the
order of the questions, and does not depend on timing: an interrupted and resumed run gives the same
texts. (Log-probabilities may round differently in other batches; with --min-messages, which
rollouts are cancelled depends on what else was running.)
"""

import argparse
import hashlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from kernels import __version__
from kernels.runtime.dtypes import dtype_name
from model.errors import InputError
from model.step3vl import Step3VL
from model.vision.image import Views, load_image
from pacore_sched.answers.journal import Journal, RolloutResult, replace_file
from pacore_sched.answers.pacore import Answer, Pacore
from pacore_sched.answers.problem_run import Problem
from pacore_sched.answers.questions import Question, read_questions
from pacore_sched.cli import options as shared
from pacore_sched.cli.progress import batch_progress
from pacore_sched.sched.request import Sampling

SHOWN_FAILURES = 10


@dataclass(frozen=True)
class Job:
    """The parts of a run that differ between `batch` and `sample`.

    name: the command
    width: rollouts of a problem's widest round
    settings: what the results depend on, other than sampling and model options
    line: from a question, its ProblemResult and its rollouts to the object in its output line
    keep_tokens: whether the journal holds every token and its log-probability
    logprobs: the kind of log-probability, as in `Sampling`
    """

    name: str
    width: int
    settings: dict
    pacore: Callable[..., Pacore]  # (model, engine, sampling=...) -> Pacore
    line: Callable[[Question, "ProblemResult", Sequence[RolloutResult]], dict]
    keep_tokens: bool = False
    logprobs: str = "raw"


@dataclass(frozen=True)
class ProblemResult:
    """A problem's answer, or why there is none."""

    text: str
    error: str | None


@dataclass
class Progress:
    """The counts of a run so far."""

    problems: int
    ended: int = 0
    failed: int = 0
    rollouts: int = 0
    tokens: int = 0
    start: float = field(default_factory=time.perf_counter)

    def note(self, answer: Answer) -> None:
        """Count one finished problem."""
        self.ended += 1
        self.failed += answer.error is not None

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start


class Stopped(Exception):
    """The user has stopped the run."""


def add_job_options(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the options that every job has; `what` describes an output line."""
    parser.add_argument(
        "--out",
        required=True,
        help=f"JSONL file, written at the end with {what} per line; finished rollouts are in"
        " .journal.jsonl next to it during the run",
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    shared.add_sampling_options(parser)
    shared.add_model_options(parser)
    shared.add_engine_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document, nothing else")


def run_job(options: argparse.Namespace, path: str, job: Job) -> int:
    """Run a job on the questions in `path`; returns 0, 1 if a problem failed, 130 if stopped.

    Raises InputError for mistakes that are not those of a single question.
    """
    out = Path(options.out)
    if not out.name:
        raise InputError(f"--out {options.out!r} is not a file name")
    journal_path = out.with_suffix(".journal.jsonl")
    _check_output(out, journal_path, options.resume)
    shared.check_sampling(options)
    file = read_questions(path)
    model = shared.load_model(options)
    sampling = shared.sampling_for(options, model.config.sampling)
    sampling = replace(sampling, logprobs=job.logprobs)
    engine = shared.make_engine(options, model, problems=len(file.questions), width=job.width)
    pacore = job.pacore(model, engine, sampling=sampling)
    header = _header(options, job, model, sampling, file.digest)
    with Journal(journal_path, header, resume=options.resume) as journal:
        resumed = journal.rollouts
        progress = Progress(len(file.questions), rollouts=resumed)
        results, stopped = _run(job, pacore, file.questions, journal, progress)
        if not stopped:
            replace_file(out, _lines(job, file.questions, results, journal))
    report = _report(pacore, progress, resumed, out, journal_path, stopped)
    if options.json:
        print(json.dumps(report))
    _print_summary(report, results, file.questions, quiet=options.json)
    return 130 if stopped else int(progress.failed > 0)


def _check_output(out: Path, journal: Path, resume: bool) -> None:
    """Raise InputError if the output would overwrite a file or cannot be written."""
    if not out.parent.is_dir():
        raise InputError(f"cannot write {out.name}: there is no folder {out.parent}")
    if journal.exists() or not out.exists():
        return  # opening the journal checks whether it may be resumed
    if resume:
        raise InputError(f"{out} exists but {journal.name} does not: there is nothing to resume")
    raise InputError(f"{out} already exists: choose another --out")


def _header(
    options: argparse.Namespace, job: Job, model: Step3VL, sampling: Sampling, digest: str
) -> dict:
    """The journal's header: everything that the results depend on."""
    path = Path(options.model)
    return {
        "command": job.name,
        "version": __version__,
        "model": str(path.resolve()) if path.exists() else options.model,
        "device": model.device.type,
        "dtype": dtype_name(model.dtype),
        "kv_dtype": options.kv_dtype,
        "impl": options.impl,
        "chat_template_sha256": text_digest(model.tokenizer.chat_template),
        "questions_sha256": digest,
        **job.settings,
        "seed": options.seed,
        **asdict(sampling),
    }


def text_digest(text: str | None) -> str | None:
    """SHA-256 of a text, such as a template; None if there is none."""
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def _run(
    job: Job,
    pacore: Pacore,
    questions: Sequence[Question],
    journal: Journal,
    progress: Progress,
) -> tuple[dict[int, ProblemResult], bool]:
    """Answer the questions; returns their results by line, and whether the user stopped the run."""
    results = {q.line: ProblemResult("", q.error) for q in questions if q.error}
    progress.ended = progress.failed = len(results)
    valid = [question for question in questions if not question.error]
    lines = {question.id: question.line for question in valid}

    with batch_progress(pacore.engine, progress) as refresh, _stop_signals() as stop_requested:

        def on_rollout(result: RolloutResult) -> None:
            journal.add([result], tokens=job.keep_tokens)
            progress.rollouts += 1

        def on_step(tokens: int) -> None:
            progress.tokens += tokens
            refresh()
            if stop_requested():
                raise Stopped

        problems = (
            _problem(question, pacore.model) for question in questions if not question.error
        )
        answers = pacore.answers(
            problems, known=journal.results, on_rollout=on_rollout, on_step=on_step
        )
        try:
            for answer in answers:
                _complete(journal, answer, tokens=job.keep_tokens)
                results[lines[answer.problem]] = _problem_result(answer, lines[answer.problem])
                journal.add_answer(answer.problem, answer.text, answer.error)
                progress.note(answer)
        except Stopped:
            return results, True
    return results, False


def _complete(journal: Journal, answer: Answer, *, tokens: bool) -> None:
    """Add cancelled rollouts that are missing from the journal because the earlier run was killed
    after the last message that a round waited for, before it wrote them."""
    rollouts = [rollout for round_ in answer.rounds for rollout in round_.rollouts]
    if journal.count(answer.problem) < len(rollouts):
        known = {(rollout.round, rollout.index) for rollout in journal.results(answer.problem)}
        missing = [r for r in rollouts if (r.round, r.index) not in known]
        journal.add(missing, tokens=tokens)


def _problem_result(answer: Answer, line: int) -> ProblemResult:
    return ProblemResult(answer.text, answer.error and f"line {line}: {answer.error}")


def _problem(question: Question, model: Step3VL) -> Problem:
    def load() -> list[Views]:
        return shared.views_of(map(load_image, question.images), model)

    return Problem(question.messages, load if question.images else None, question.id)


def _lines(
    job: Job, questions: Sequence[Question], results: dict[int, ProblemResult], journal: Journal
) -> Iterator[str]:
    """The lines of the output, from the journal."""
    for question in questions:
        rollouts = [] if question.error else journal.results(question.id)
        yield json.dumps(job.line(question, results[question.line], rollouts))


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C or SIGTERM came; a second one ends the process."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(number: int, frame: object) -> None:
        received.append(number)
        restore()

    for number in before:
        signal.signal(number, receive)
    try:
        yield lambda: bool(received)
    finally:
        restore()


def _report(
    pacore: Pacore, progress: Progress, resumed: int, out: Path, journal: Path, stopped: bool
) -> dict:
    """The JSON document that `--json` prints."""
    stats, counts = pacore.engine.stats, pacore.engine.scheduler.counts
    seconds = progress.seconds
    return {
        "problems": progress.problems,
        "ended": progress.ended,
        "failed": progress.failed,
        "rollouts": progress.rollouts,
        "resumed_rollouts": resumed,
        "tokens": stats.generated,
        "seconds": seconds,
        "tokens_per_second": stats.generated / seconds,
        "preemptions": counts.preemptions,
        "recomputed_tokens": counts.recomputed,
        "cancelled_tokens": counts.cancelled,
        "prefix_tokens_saved": pacore.prefix_tokens_saved,
        "kv_tokens_read": stats.kv_read,
        "kv_tokens_read_unshared": stats.kv_read_unshared,
        "out": None if stopped else str(out),
        "journal": str(journal),
        "stopped": stopped,
    }


def _print_summary(
    report: dict, results: dict[int, ProblemResult], questions: Sequence[Question], *, quiet: bool
) -> None:
    """Print errors and how to resume to stderr, and unless `quiet`, a summary to stdout."""
    errors = [results[q.line].error for q in questions if q.line in results]
    errors = [error for error in errors if error]
    for error in errors[:SHOWN_FAILURES]:
        print(f"failed: {error}", file=sys.stderr)
    if len(errors) > SHOWN_FAILURES:
        print(f"failed: {len(errors) - SHOWN_FAILURES} more", file=sys.stderr)
    if report["stopped"]:
        print(
            f"stopped: {report['rollouts']} rollouts are saved in {report['journal']};"
            " continue with the same command and --resume",
            file=sys.stderr,
        )
    if not quiet:
        print(
            f"=== {report['ended']} of {report['problems']} problems ended, {report['failed']} of"
            f" them failed; {report['rollouts']} rollouts, {report['resumed_rollouts']} of them"
            f" from an earlier run; {report['tokens']} tokens in {report['seconds']:.1f} s"
            f" ({report['tokens_per_second']:.1f} tokens/s); {report['preemptions']} preemptions"
            f"\n=== {report['out'] or report['journal']}"
        )
