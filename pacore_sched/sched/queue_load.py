"""When a replica takes another problem from the queue that it shares with others."""

from dataclasses import dataclass

from pacore_sched.sched.scheduler import Scheduler


@dataclass(frozen=True)
class QueueLoad:
    """waits: a rollout is waiting to start; full: as many rollouts run as may."""

    waits: bool = False
    full: bool = False

    @staticmethod
    def of(scheduler: Scheduler) -> "QueueLoad":
        waits = any(group.waiting for group in scheduler.groups)
        return QueueLoad(waits, len(scheduler.running) == scheduler.max_running)

    def takes(self, *, ahead: bool) -> bool:
        """Whether the replica takes a problem. `ahead`: also one that would only wait, so that its
        prompt and images are prepared in time. This is right while the queue is longer than the
        number of replicas: after that, another replica may have room for the problem earlier.
        """
        return not self.waits and (ahead or not self.full)
