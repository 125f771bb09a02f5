"""A file of questions through the engine into a file of results: what `batch` and `sample` share.

While it runs, everything that has ended is in the journal beside the output (answers/journal.py):
JSONL, to be read at any time. The output itself is written from the journal at the very end, in the
order of the questions, and holds nothing that depends on time: rollouts say the same whether the
run was disturbed and resumed or not. (Log-probabilities may round otherwise beside other rollouts;
with --min-messages, which rollouts a round still waited for is a matter of what ran beside them.)
"""

import argparse
import hashlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
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
    """What a command makes of the questions.

    width: rollouts of a problem's widest round
    settings: what the results depend on besides the options of sampling and model
    line: a question, its ProblemResult and its rollouts -> the object that is its line of the output
    keep_tokens: whether the journal holds every token and its log-probability
    """

    name: str
    width: int
    settings: dict
    pacore: Callable[..., Pacore]  # (model, engine, sampling=...) -> Pacore
    line: Callable[[Question, "ProblemResult", Sequence[RolloutResult]], dict]
    keep_tokens: bool = False


@dataclass(frozen=True)
class ProblemResult:
    """How a problem ended."""

    text: str
    error: str | None


@dataclass
class Progress:
    """Counts of a run so far."""

    problems: int
    ended: int = 0
    failed: int = 0
    rollouts: int = 0
    tokens: int = 0
    start: float = field(default_factory=time.perf_counter)

    def note(self, answer: Answer) -> None:
        """Count a problem that has ended."""
        self.ended += 1
        self.failed += answer.error is not None

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start


class Stopped(Exception):
    """The user wants no more."""


def add_job_options(parser: argparse.ArgumentParser, what: str) -> None:
    """The options that every job has; `what` names a line of its output."""
    parser.add_argument(
        "--out",
        required=True,
        help=f"JSONL file to write at the end, {what} per line; what has ended so far is in"
        " .journal.jsonl beside it",
    )
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    shared.add_sampling_options(parser)
    shared.add_model_options(parser)
    shared.add_engine_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document, nothing else")


def run_job(options: argparse.Namespace, path: str, job: Job) -> int:
    """Run a job on the questions in `path`: 0, 1 if some problem failed, 130 if it was stopped.

    Raises InputError for what concerns all of it.
    """
    out = Path(options.out)
    if not out.name:
        raise InputError(f"--out {options.out!r} is not the name of a file")
    journal_path = out.with_suffix(".journal.jsonl")
    _check_output(out, journal_path, options.resume)
    shared.check_sampling(options)
    file = read_questions(path)
    model = shared.load_model(options)
    sampling = shared.sampling_for(options, model.config.sampling)
    engine = shared.make_engine(options, model, problems=len(file.questions), width=job.width)
    pacore = job.pacore(model, engine, sampling=sampling)
    header = _header(options, job, model, sampling, file.digest)
    with Journal(journal_path, header, resume=options.resume) as journal:
        resumed = journal.rollouts
        done = Progress(len(file.questions), rollouts=resumed)
        endings, stopped = _run(job, pacore, file.questions, journal, done)
        if not stopped:
            replace_file(out, _lines(job, file.questions, endings, journal))
    report = _report(pacore, done, resumed, out, journal_path, stopped)
    if options.json:
        print(json.dumps(report))
    _print_summary(report, endings, file.questions, quiet=options.json)
    return 130 if stopped else int(done.failed > 0)


def _check_output(out: Path, journal: Path, resume: bool) -> None:
    """Raise InputError if the output would overwrite something, or cannot be written."""
    if not out.parent.is_dir():
        raise InputError(f"no folder {out.parent} to write {out.name} to")
    if journal.exists() or not out.exists():
        return  # the journal says whether it may be gone on with
    if resume:
        raise InputError(f"{out} is there without {journal.name}: there is nothing to resume")
    raise InputError(f"{out} is there already: choose another --out")


def _header(
    options: argparse.Namespace, job: Job, model: Step3VL, sampling: Sampling, digest: str
) -> dict:
    """All that the results depend on."""
    path = Path(options.model)
    return {
        "command": job.name,
        "version": __version__,
        "model": str(path.resolve()) if path.exists() else options.model,
        "device": model.device.type,
        "dtype": dtype_name(model.dtype),
        "kv_dtype": options.kv_dtype,
        "impl": options.impl,
        "questions_sha256": digest,
        **job.settings,
        "seed": options.seed,
        **asdict(sampling),
    }


def template_digest(path: str | None) -> str | None:
    """SHA-256 of a template's file, None for the default one."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else None


def _run(
    job: Job,
    pacore: Pacore,
    questions: Sequence[Question],
    journal: Journal,
    done: Progress,
) -> tuple[dict[int, ProblemResult], bool]:
    """Answer the questions; how they ended, by line, and whether the user stopped it."""
    endings = {q.line: ProblemResult("", q.error) for q in questions if q.error}
    done.ended = done.failed = len(endings)
    good = [question for question in questions if not question.error]
    lines = {question.id: question.line for question in good}

    with batch_progress(pacore.engine, done) as refresh, _stop_signals() as asked_to_stop:

        def on_rollout(result: RolloutResult) -> None:
            journal.add([result], tokens=job.keep_tokens)
            done.rollouts += 1

        def on_step(tokens: int) -> None:
            done.tokens += tokens
            refresh()
            if asked_to_stop():
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
                endings[lines[answer.problem]] = _result(answer, lines[answer.problem])
                journal.add_answer(answer.problem, answer.text, answer.error)
                done.note(answer)
        except Stopped:
            return endings, True
    return endings, False


def _complete(journal: Journal, answer: Answer, *, tokens: bool) -> None:
    """Write the cancelled rollouts that a kill kept from the journal, when it fell in between the
    last message that a round waited for and them."""
    results = [result for round_ in answer.rounds for result in round_.rollouts]
    if journal.count(answer.problem) < len(results):
        known = {(result.round, result.index) for result in journal.results(answer.problem)}
        missing = [result for result in results if (result.round, result.index) not in known]
        journal.add(missing, tokens=tokens)


def _result(answer: Answer, line: int) -> ProblemResult:
    return ProblemResult(answer.text, answer.error and f"line {line}: {answer.error}")


def _problem(question: Question, model: Step3VL) -> Problem:
    def load() -> list[Views]:
        return shared.views_of(map(load_image, question.images), model)

    return Problem(question.messages, load if question.images else None, question.id)


def _lines(
    job: Job, questions: Sequence[Question], endings: dict[int, ProblemResult], journal: Journal
) -> Iterator[str]:
    """The output, line by line, from what the journal holds."""
    for question in questions:
        results = [] if question.error else journal.results(question.id)
        yield json.dumps(job.line(question, endings[question.line], results))


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM only set what the yielded function tells; the second one ends at once."""
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
    pacore: Pacore, done: Progress, resumed: int, out: Path, journal: Path, stopped: bool
) -> dict:
    """The JSON document of a job."""
    stats, counts = pacore.engine.stats, pacore.engine.scheduler.counts
    seconds = done.seconds
    return {
        "problems": done.problems,
        "ended": done.ended,
        "failed": done.failed,
        "rollouts": done.rollouts,
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
    report: dict, endings: dict[int, ProblemResult], questions: Sequence[Question], *, quiet: bool
) -> None:
    """For people: why problems failed and how to resume on stderr, and a summary on stdout."""
    errors = [endings[q.line].error for q in questions if q.line in endings]
    errors = [error for error in errors if error]
    for error in errors[:SHOWN_FAILURES]:
        print(f"failed: {error}", file=sys.stderr)
    if len(errors) > SHOWN_FAILURES:
        print(f"failed: {len(errors) - SHOWN_FAILURES} more", file=sys.stderr)
    if report["stopped"]:
        print(
            f"stopped: {report['rollouts']} rollouts are kept in {report['journal']};"
            " the same command with --resume goes on from there",
            file=sys.stderr,
        )
    if not quiet:
        print(
            f"=== {report['ended']} of {report['problems']} problems, {report['failed']} of them"
            f" failed; {report['rollouts']} rollouts, {report['resumed_rollouts']} of an earlier"
            f" run; {report['tokens']} tokens in {report['seconds']:.1f} s:"
            f" {report['tokens_per_second']:.1f} tokens/s; {report['preemptions']} preemptions"
            f"\n=== {report['out'] or report['journal']}"
        )
