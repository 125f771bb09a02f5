"""PaCoRe problems that were cut short: their finished rollouts, kept for when they are asked again.

When the server ends, or a client leaves, before a problem is answered, the rollouts that have ended
are written to a run journal (answers/journal.py) in a folder, one file per request body. The same
body sent again goes on from there, with the seed it had, and its file is removed when it has been
answered. Problems with images that are not in the body are not kept: a URL's content may change.
"""

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from model.errors import InputError
from pacore_sched.answers.journal import Journal
from pacore_sched.answers.journal_lines import Expected, RolloutResult
from pacore_sched.answers.problem_run import Settings, rollout_seed

log = logging.getLogger(__name__)


@dataclass
class Saving:
    """What is kept of one request; `close` it at its end.

    settings: the request's, with the seed of the earlier one
    known: rollouts that the earlier one finished
    ended: whether the request has been answered
    """

    settings: Settings
    known: Sequence[RolloutResult] = ()
    keep: Callable[["Saving", Sequence[RolloutResult]], None] = lambda saving, results: None
    ended: bool = False

    def close(self, results: Sequence[RolloutResult]) -> None:
        """`results` are the rollouts that ended since the request began. Errors are logged."""
        keep, self.keep = self.keep, lambda saving, results: None
        keep(self, results)

    def drop(self) -> None:
        """Remove what is known: it does not fit any more."""
        self.known, self.ended = (), True
        self.close(())


class SavedProblems:
    """The journals in a folder; `model` identifies the weights that rollouts came from."""

    def __init__(self, folder: Path, model: object) -> None:
        """Raises InputError for a folder that cannot be made or written."""
        self._folder, self._model = folder, model
        self._running: set[Path] = set()  # of requests that have not ended
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".probe"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise InputError(f"--journal {folder}: {error.strerror}") from None

    async def open(self, messages: Sequence[dict], seed: int | None, settings: Settings) -> Saving:
        """What is known of a request; `seed` is the one in its body, if there is one."""
        header = {
            "model": self._model,
            "messages": _digest(messages),
            "widths": list(settings.widths),
            "min_messages": settings.min_messages,
            "sampling": asdict(settings.sampling),
        }
        path = self._folder / f"{_digest([header, seed])}.journal.jsonl"
        if path in self._running:  # the same request runs already
            return Saving(settings)
        self._running.add(path)
        try:
            return await asyncio.to_thread(self._read, path, header, settings)
        except BaseException:  # the client has left
            self._running.discard(path)
            raise

    def _read(self, path: Path, header: dict, settings: Settings) -> Saving:
        known: Sequence[RolloutResult] = ()
        try:
            if path.exists():
                with open(path, "rb") as file:
                    seed = json.loads(file.readline())["seed"]
                settings = replace(settings, seed=seed)
                with _journal(path, header | {"seed": seed}, settings) as journal:
                    known = journal.results("")
        except (OSError, ValueError, KeyError, TypeError) as error:
            # It may be damaged, another server's, or of another version: it is left as it is.
            log.warning("a file is not resumed", extra={"file": str(path), "error": str(error)})
            self._running.discard(path)
            return Saving(settings)
        header = header | {"seed": settings.seed}
        return Saving(settings, known, partial(self._keep, path, header))

    def _keep(
        self, path: Path, header: dict, saving: Saving, results: Sequence[RolloutResult]
    ) -> None:
        """Remove the file of an answered request; add results to that of another.

        Not those of the last round, whose text has been sent in part, and not failed ones, which
        would fail again.
        """
        self._running.discard(path)
        last = len(saving.settings.widths) - 1
        results = [r for r in results if r.round < last and r.finish_reason != "error"]
        try:
            if saving.ended:
                path.unlink(missing_ok=True)
            elif results:
                with _journal(path, header, saving.settings) as journal:
                    journal.begin().add(results)
                log.info("rollouts are saved", extra={"file": str(path), "count": len(results)})
        except (OSError, InputError) as error:
            log.error("rollouts are lost", extra={"file": str(path), "error": str(error)})


def _journal(path: Path, header: dict, settings: Settings) -> Journal:
    seed = partial(rollout_seed, settings.seed)
    cancels = settings.min_messages is not None
    expected = Expected({"": 0}, settings.widths, seed, cancels=cancels)
    return Journal(path, header, expected, resume=True)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
