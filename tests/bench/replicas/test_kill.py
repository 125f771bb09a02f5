"""The kill study on Ray, shortened: replicas that are killed while `batch` runs."""

import random
from pathlib import Path

import pytest

from bench.replicas.batch_run import BatchRun
from bench.replicas.kill import ROLLOUTS, Study, batch_options

pytest.importorskip("ray")

PROBLEMS = 8


class KillAt:
    """Kills a random replica when each of these numbers of rollouts has ended."""

    def __init__(self, *rollouts: int) -> None:
        self.rollouts, self.draw = list(rollouts), random.Random(0)

    def __call__(self, run: BatchRun) -> None:
        if self.rollouts and run.files.rollouts() >= self.rollouts[0]:
            before = run.kills
            run.kill_replica(self.draw)
            if run.kills > before:
                self.rollouts.pop(0)


@pytest.mark.cli
def test_replicas_are_killed(tmp_path: Path):
    """Problems of a lost replica that are not run again, or rollouts that are in the journal twice.
    The output is that of one engine without Ray."""
    words = batch_options("tiny", 2)
    alone = words[: words.index("--replicas")]
    reference = Study(tmp_path, PROBLEMS, alone).undisturbed()
    assert reference["failure"] is None
    assert reference["rollouts_again"] == reference["tokens_again"] == 0
    row = Study(tmp_path, PROBLEMS, words).replicas_killed(KillAt(2, 14))
    assert row["failure"] is None
    assert (row["kills"], row["rollouts"]) == (2, PROBLEMS * ROLLOUTS)
    assert row["rollouts_again"] > 0
