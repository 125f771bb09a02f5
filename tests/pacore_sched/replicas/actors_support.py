"""Engines that replicas in processes of their own run: on a fake model whose tokens are hashes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from model.errors import InputError
from pacore_sched.answers.pacore import Pacore
from pacore_sched.sched.request import Batch
from tests.pacore_sched.answers.hashed_pacore import hashed


@dataclass(frozen=True)
class HashedBuild:
    """Makes a fake engine whose steps take `step_s` seconds.

    failing: problems whose steps fail
    error: raised instead of making one
    """

    widths: tuple[int, ...] = (6, 2)
    step_s: float = 0.0
    failing: Sequence[int] = ()
    error: str = ""

    def __call__(self, model: object = None, kv_tokens: int | None = None) -> Pacore:
        if self.error:
            raise InputError(self.error)
        pacore = hashed(self.widths)
        launch = pacore.engine.executor.launch

        def slow_launch(tree: object, batch: Batch) -> object:
            if any(rollout.group.problem in self.failing for rollout in batch.decode):
                raise MemoryError("out of memory")
            time.sleep(self.step_s)
            return launch(tree, batch)

        pacore.engine.executor.launch = slow_launch
        return pacore


def describe(pacore: Pacore) -> dict[str, object]:
    return {"seed": pacore.settings.seed}
