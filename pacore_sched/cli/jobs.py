"""The run from a question file to a results file that `batch` and `sample` share.

During the run, finished rollouts are in the journal next to the output (answers/journal.py), a
JSONL file that can be read at any time. The output is written from the journal at the end, in the
order of the questions, and does not depend on timing: an interrupted and resumed run gives the same
texts. (Log-probabilities may round differently in other batches; with --min-messages, which
rollouts are cancelled depends on what else was running.) What the results depend on is compared
before the weights are loaded, as far as it is known then.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from kernels import __version__
from kernels.runtime.dtypes import dtype_name
from model.errors import InputError, reason
from model.terminal import stop_signals
from model.text.files import check_target, open_file, parse_json
from pacore_sched.answers.journal import Journal, draft_of, replace_file
from pacore_sched.answers.journal_lines import Expected, RolloutResult
from pacore_sched.answers.live import Answer
from pacore_sched.answers.pacore import Pacore
from pacore_sched.answers.problem_run import rollout_seed
from pacore_sched.answers.questions import Question, read_questions
from pacore_sched.cli import options as shared
from pacore_sched.cli.inputs import ImageFiles, image_files, model_identity
from pacore_sched.cli.progress import batch_progress
from pacore_sched.cli.runners import Build, Runner, Source, runner_of
from pacore_sched.engine.stopping import checked_stops
from pacore_sched.replicas.messages import Totals

SHOWN_FAILURES = 10


@dataclass(frozen=True)
class Job:
    """The parts of a run that differ between `batch` and `sample`.

    name: the command
    widths: rollouts of every round of a problem, the synthesis included
    settings: what the results depend on, other than sampling and model options
    line: from a question, its ProblemResult and its rollouts to the object in its output line
    keep_tokens: whether the journal holds every token and its log-probability
    logprobs: the kind of log-probability, as in `Sampling`
    """

    name: str
    widths: Sequence[int]
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


class Stopped(KeyboardInterrupt):
    """The user has stopped the run. No handler of a problem's errors may take it for one."""


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
    shared.add_replica_options(parser)
    parser.add_argument(
        "--migrate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with --replicas: move rollouts to replicas that are idle at the end",
    )
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
    checked_stops(options.stop)
    file = read_questions(path)
    settings = _settings(options, job, file.digest)
    expected = _expected(options, job, file.questions)
    with Journal(journal_path, settings, expected, resume=options.resume) as journal:
        images = ImageFiles(journal)
        images.check(file.questions)
        problems = len(file.questions)
        build = Build(options, job.pacore, job.logprobs, problems, max(job.widths))
        with runner_of(options, build, _model_settings) as runner:
            journal.begin(runner.settings)
            resumed = journal.rollouts
            progress = Progress(problems, rollouts=resumed)
            results, stopped = _run(runner, file.questions, journal, images, progress)
            totals, counts = runner.totals, runner.counts
        if not stopped:
            replace_file(out, _lines(job, file.questions, results, journal, progress))
    report = _report(totals, progress, resumed, out, journal_path, stopped) | counts
    if options.json:
        print(json.dumps(report))
    _print_summary(report, results, file.questions, quiet=options.json)
    return 130 if stopped else int(progress.failed > 0)


def _check_output(out: Path, journal: Path, resume: bool) -> None:
    """Raise InputError if the output would overwrite a file or cannot be written."""
    if not out.parent.is_dir():
        raise InputError(f"cannot write {out.name}: there is no folder {out.parent}")
    for target in (out, draft_of(out)):
        check_target(target)
    if not os.path.exists(out):
        return
    if os.path.exists(journal):  # opening it checks whether it may be resumed
        if not _is_output(out):
            raise InputError(f"{out} is not the output of such a run: choose another --out")
        return
    if resume:
        raise InputError(f"{out} exists but {journal.name} does not: there is nothing to resume")
    raise InputError(f"{out} already exists: choose another --out")


def _is_output(path: Path) -> bool:
    """Whether the first line of a file is that of an output, which a resumed run may replace: the
    outputs a.jsonl and a.txt would have one journal."""
    with open_file(path) as file:
        line = file.readline()
    try:
        first = parse_json(line.decode())
    except ValueError:
        return False
    return isinstance(first, dict) and {"id", "failed"} <= first.keys()


def _settings(options: argparse.Namespace, job: Job, digest: str) -> dict:
    """The part of the journal's header that is known without the model; `digest` is that of the
    questions. Together with `_model_settings`, it has everything that the results depend on."""
    return {
        "command": job.name,
        "version": __version__,
        "model": model_identity(options.model),
        "rope_scaling": options.rope_scaling,
        "kv_dtype": options.kv_dtype,
        "impl": options.impl,
        "questions_sha256": digest,
        **job.settings,
        "seed": options.seed,
        "max_tokens": options.max_tokens,
        "stop": options.stop,
    }


def _model_settings(pacore: Pacore) -> dict:
    """The other part; omitted options have the model's values. No result depends on
    `top_logprobs`, and older journals lack it."""
    model, settings = pacore.model, asdict(pacore.settings.sampling)
    del settings["top_logprobs"]
    return {
        "device": model.device.type,
        "dtype": dtype_name(model.dtype),
        "chat_template_sha256": text_digest(model.tokenizer.chat_template),
        **settings,
    }


def _expected(options: argparse.Namespace, job: Job, questions: Sequence[Question]) -> Expected:
    files = {question.id: None for question in questions if question.error} | {
        question.id: len(image_files(question)) for question in questions if not question.error
    }
    seed = partial(rollout_seed, options.seed)
    cancels = job.settings.get("min_messages") is not None
    return Expected(files, job.widths, seed, tokens=job.keep_tokens, cancels=cancels)


def text_digest(text: str | None) -> str | None:
    """SHA-256 of a text, such as a template; None if there is none."""
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def _run(
    runner: Runner,
    questions: Sequence[Question],
    journal: Journal,
    images: ImageFiles,
    progress: Progress,
) -> tuple[dict[int, ProblemResult], bool]:
    """Answer the questions; returns their results by line, and whether the user stopped the run."""
    results = {q.line: ProblemResult("", q.error) for q in questions if q.error}
    progress.ended = progress.failed = len(results)
    valid = [question for question in questions if not question.error]
    lines = {question.id: question.line for question in valid}

    def kv_used() -> float:
        return runner.kv_used

    with batch_progress(kv_used, progress) as refresh, _stop_signals() as check_stop:

        def on_rollout(result: RolloutResult) -> None:
            journal.add([result], images=images.hashes(result.problem))
            progress.rollouts += 1

        def on_turn() -> None:
            progress.tokens = runner.totals.engine.generated
            refresh()
            check_stop()

        source = Source(valid, journal, images, check_stop)
        try:
            for answer in runner.answers(source, on_rollout, on_turn):
                line = lines[answer.problem]
                error = answer.error and f"line {line}: {answer.error}"
                results[line] = ProblemResult(answer.text, error)
                _complete(journal, answer)
                journal.add_answer(answer.problem, answer.text, answer.error)
                progress.note(answer)
        except Stopped:
            return results, True
    return results, False


def _complete(journal: Journal, answer: Answer) -> None:
    """Add cancelled rollouts that are missing from the journal because the earlier run was killed
    after the last message that a round waited for, before it wrote them."""
    finished = journal.finished(answer.problem)
    rollouts = [rollout for round_ in answer.rounds for rollout in round_.rollouts]
    missing = [r for r in rollouts if (r.round, r.index) not in finished]
    if missing:
        journal.add(missing)


def _lines(
    job: Job,
    questions: Sequence[Question],
    results: dict[int, ProblemResult],
    journal: Journal,
    progress: Progress,
) -> Iterator[str]:
    """The lines of the output, from the journal. A problem without one fails, in `results` too."""
    for question in questions:
        rollouts = [] if question.error else journal.results(question.id)
        try:
            line = json.dumps(job.line(question, results[question.line], rollouts))
        except Exception as error:
            result = ProblemResult("", f"line {question.line}: {reason(error)}")
            progress.failed += results[question.line].error is None
            results[question.line] = result
            line = json.dumps(job.line(question, result, []))
        yield line


@contextmanager
def _stop_signals() -> Iterator[Callable[[], None]]:
    """Yields a function that raises Stopped once Ctrl-C or SIGTERM has come; a second one ends the
    process."""
    received: list[int] = []
    before = stop_signals()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(number: int, frame: object) -> None:
        received.append(number)
        restore()

    def check_stop() -> None:
        if received:
            raise Stopped

    for number in before:
        signal.signal(number, receive)
    try:
        yield check_stop
    finally:
        restore()


def _report(
    totals: Totals, progress: Progress, resumed: int, out: Path, journal: Path, stopped: bool
) -> dict:
    """The JSON document that `--json` prints."""
    stats, counts = totals.engine, totals.scheduler
    seconds = progress.seconds
    return {
        "problems": progress.problems,
        "ended": progress.ended,
        "failed": progress.failed,
        "rollouts": progress.rollouts,
        "resumed_rollouts": resumed,
        "started_rollouts": counts.started,
        "tokens": stats.generated,
        "seconds": seconds,
        "tokens_per_second": stats.generated / seconds,
        "preemptions": counts.preemptions,
        "recomputed_tokens": counts.recomputed,
        "cancelled_tokens": counts.cancelled,
        "prefix_tokens_saved": counts.prefix_hits - counts.prefilled,
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
