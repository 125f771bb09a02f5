"""Engines that replicas in processes of their own run: on a fake model whose tokens are hashes."""

import time
from dataclasses import dataclass

from model.errors import InputError
from pacore_sched.answers.pacore import Pacore
from tests.pacore_sched.answers.hashed_pacore import hashed


@dataclass(frozen=True)
class HashedBuild:
    """Makes a fake engine whose steps take `step_s` seconds.

    failing: whether its steps fail
    error: raised instead of making one
    """

    widths: tuple[int, ...] = (6, 2)
    step_s: float = 0.0
    failing: bool = False
    error: str = ""

    def __call__(self, model: object = None, kv_tokens: int | None = None) -> Pacore:
        if self.error:
            raise InputError(self.error)
        pacore = hashed(self.widths)
        launch = pacore.engine.executor.launch

        def slow_launch(*arguments: object) -> object:
            if self.failing:
                raise MemoryError("out of memory")
            time.sleep(self.step_s)
            return launch(*arguments)

        pacore.engine.executor.launch = slow_launch
        return pacore


def describe(pacore: Pacore) -> dict[str, object]:
    return {"seed": pacore.settings.seed}
