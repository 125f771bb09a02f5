"""Which replica runs what: the part of a run on several replicas that Ray cannot know.

A problem stays on one replica, through all its rounds: the KV of its prompt and images is there. A
replica pulls the next problem when none of its rollouts is waiting to start, so a slow one gets
fewer (sched/queue_load.py). Once no problem waits, rollouts move to replicas where they are
expected to end earlier. If a replica is lost, its problems go back to the front of the queue with
the results known so far, and its parts to another replica as they had left home. A problem that was
there twice when a step failed runs last, on a replica of its own: if that fails too, the problem is
given up, not one replica after the other. No communication happens here, so a test or a measurement
can play the replicas.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.answers.live import Answer
from pacore_sched.answers.problem_run import Part
from pacore_sched.replicas.messages import Key, Orders, Report, Task, Totals
from pacore_sched.sched.request import Partial
from pacore_sched.sim.replica_state import ReplicaState
from pacore_sched.sim.tail_moves import TailMoves

SECONDS = 0.25  # between a replica's reports
AT_SECONDS = 128  # with more replicas they report less often
SUSPECT = 2  # failures on its replicas after which a problem runs alone


class Place(NamedTuple):
    """A rollout of a problem."""

    problem: int
    round: int
    rollout: int


@dataclass
class _Replica:
    """What the coordinator knows of a replica."""

    tasks: dict[Key, Task] = field(default_factory=dict)
    outbox: Orders = field(default_factory=Orders)
    sent: Orders = field(default_factory=Orders)  # of the last call
    calling: bool = False  # a report is due
    report: Report = field(default_factory=Report)
    state: ReplicaState | None = None  # of the last report, unless that has become wrong
    leaving: set[Place] = field(default_factory=set)  # ordered to move away
    coming: set[Place] = field(default_factory=set)  # ordered to move here


class Coordinator:
    """Assigns tasks to replicas, which are numbered by whoever communicates with them.

    tasks: the problems in order of arrival; read as replicas have room
    problems: the number of tasks, or more
    known: maps a problem's id to all its results so far
    on_result: called for every rollout that ended, with its problem's id
    on_answer: called for every problem that ended
    moves: which rollouts move once no problem waits; None: they all stay
    """

    def __init__(
        self,
        tasks: Iterable[Task],
        problems: int,
        *,
        known: Callable[[str], Sequence[RolloutResult]],
        on_result: Callable[[RolloutResult], None],
        on_answer: Callable[[Answer], None],
        moves: TailMoves | None = None,
    ) -> None:
        self._new, self._left, self._known = iter(tasks), problems, known
        self._next: Task | None = None
        self._returned: deque[Task] = deque()  # of lost replicas
        self._failures: Counter[int] = Counter()  # problem -> failures on its replicas
        self._suspects: deque[Task] = deque()  # returned tasks that are to run alone
        self._on_result, self._on_answer = on_result, on_answer
        self._moves = moves
        self._replicas: dict[int, _Replica] = {}
        self._homes: dict[int, int] = {}  # problem -> its replica
        self._parts: dict[Key, int] = {}  # part -> its replica
        self._parts_of: dict[int, list[Key]] = {}  # problem -> its parts, ended ones included
        self._targets: dict[Place, int] = {}  # of moves whose rollouts have not left
        self._num_parts = 0
        self._due: dict[int, None] = {}  # idle replicas that may have something to do
        self._num_calling = self._num_reports = 0  # reports that are due; since the last moves
        self._kv_used = 0.0  # sum of the replicas' shares
        self.totals = Totals()  # of all replicas, lost ones included as far as they have reported
        self.moved = 0  # rollouts

    @property
    def done(self) -> bool:
        """Whether all problems have ended."""
        return not self._homes and self._exhausted and not self._suspects

    @property
    def kv_used(self) -> float:
        """Mean share of the KV pages in use."""
        return self._kv_used / max(1, len(self._replicas))

    def memory(self, replica: int) -> str:
        """A replica's use of memory at its last report, for a message."""
        return self._replicas[replica].report.memory

    def add(self, replica: int) -> None:
        """A replica is ready."""
        self._replicas[replica] = _Replica()
        self._due[replica] = None

    def lose(self, replica: int, failure: str = "") -> bool:
        """A replica is gone. Does nothing if it was not ready.

        failure: why, if a step failed, so that one of the replica's problems may be the cause

        Returns whether a problem is given up as the cause.
        """
        lost = self._replicas.pop(replica, None)
        if lost is None:
            return False
        self._due.pop(replica, None)
        self._num_calling -= lost.calling
        self._kv_used -= lost.report.kv_used
        for place in lost.leaving:
            self._give_up_move(place)
        for key in lost.tasks:
            if key.part:
                self._parts.pop(key, None)
            else:
                del self._homes[key.problem]
                self._cancel_parts(key.problem)
        there = {key.problem for key in lost.tasks.keys() - {t.key for t in lost.outbox.tasks}}
        if failure:
            self._failures.update(there)
        cause = None
        for key, task in reversed(lost.tasks.items()):
            if not key.part:
                task = replace(task, known=self._known(task.id))
                if not self._suspect(key.problem):
                    self._returned.appendleft(task)
                elif failure and {key.problem} == there and self._failures[key.problem] > SUSPECT:
                    cause = Answer(task.id, "", f"it fails even alone: {failure}", ())
                    self._drop(key.problem, cause)
                else:
                    self._suspects.appendleft(task)
            elif key.problem in self._homes and task.part and task.part.rollouts:
                self._returned.append(task)
        self._wake_all()
        return cause is not None

    def calls(self) -> Iterator[tuple[int, Orders]]:
        """Yield the orders for replicas that have something to do; each must be followed by `take`
        or `lose`."""
        while self._due:
            number = next(iter(self._due))
            del self._due[number]
            replica = self._replicas[number]
            replica.calling = True
            alone = any(self._suspect(key.problem) for key in replica.tasks)
            takes = replica.report.load.takes(ahead=self._ahead) and not alone
            if takes and (task := self._take_task()):
                self._assign(number, task)
            elif self._suspects and not replica.tasks:
                self._assign(number, self._suspects.popleft())
            orders = replica.sent = replica.outbox
            replica.outbox = Orders()
            orders.more, orders.ahead = not self._exhausted and not alone, self._ahead
            orders.seconds = SECONDS * max(1.0, len(self._replicas) / AT_SECONDS)
            needs_state = self._moves and self._exhausted and replica.state is None
            if orders or replica.report.busy or needs_state:
                self._num_calling += 1
                yield number, orders
            else:
                replica.calling = False

    def take(self, number: int, report: Report) -> None:
        """A replica has reported."""
        replica = self._replicas[number]
        self._num_calling -= replica.calling
        self._kv_used += report.kv_used - replica.report.kv_used
        self.totals.add(report.totals)
        replica.calling, replica.report, replica.state = False, report, report.state
        self._due[number] = None
        for task in replica.sent.tasks:
            replica.coming.difference_update(_places(task))
        for key, result in report.results:
            self._take_result(key, result)
        for key, round_, partials in report.detached:
            host = self._parts.get(key) if key.part else self._homes.get(key.problem)
            if host == number:  # the task has not been given to another replica since
                self._forward(key.problem, round_, partials)
                self._shrink(key, partials)
        for problem, round_, indices in replica.sent.detach:
            for index in indices:
                replica.leaving.discard(place := Place(problem, round_, index))
                self._give_up_move(place)  # if the rollout has not left: it had ended
        for problem, round_ in report.overtaken:
            self._cancel_parts(problem, round_)
        for key, answer in report.answers:
            self._take_answer(number, key, answer)
        self._num_reports += 1
        if self._moves and self._exhausted and self._num_reports > self._num_calling:
            self._num_reports = 0  # about once per round of reports: it looks at all replicas
            self._balance(self._moves)

    @property
    def _exhausted(self) -> bool:
        """Whether no problem waits for a replica."""
        if self._returned:
            return False
        if self._next is None:
            self._next = next(self._new, None)
        return self._next is None

    @property
    def _ahead(self) -> bool:
        """Whether more problems wait than there are replicas."""
        return self._left + len(self._returned) > len(self._replicas)

    def _take_task(self) -> Task | None:
        if not self._exhausted:
            if self._returned:
                return self._returned.popleft()
            new, self._next = self._next, None
            self._left -= 1
            return new
        return None

    def _assign(self, number: int, task: Task) -> None:
        replica = self._replicas[number]
        replica.tasks[task.key] = task
        replica.outbox.tasks.append(task)
        if task.key.part:
            self._parts[task.key] = number
        else:
            self._homes[task.key.problem] = number
        self._wake(number)

    def _take_result(self, key: Key, result: RolloutResult) -> None:
        home = self._homes.get(key.problem)
        if home is None:
            return  # the problem has ended
        if key.part:
            if key not in self._parts or result.finish_reason == "cancelled":
                return  # it is run again elsewhere, or not needed
            self._replicas[home].outbox.ended.append((key.problem, result))
            self._wake(home)
            self._shrink(key, [result.index])
            return  # it counts when the home reports it, whose round may have ended without it
        if self._moves and result.finish_reason != "cancelled":
            self._moves.ended(key.problem, result.round, result.num_tokens)
        self._on_result(result)

    def _take_answer(self, number: int, key: Key, answer: Answer) -> None:
        task = self._replicas[number].tasks.pop(key, None)
        if not key.part:
            if self._homes.get(key.problem) == number:
                self._end(key.problem, answer)
        elif self._parts.pop(key, None) is not None and task and answer.error:
            home = self._homes[key.problem]
            if number != home:  # where its prompt is
                self._assign(home, task)
                return
            self._replicas[home].tasks.pop(Key(key.problem))
            self._replicas[home].outbox.cancel.append(Key(key.problem))
            self._wake(home)
            self._end(key.problem, answer)

    def _end(self, problem: int, answer: Answer) -> None:
        del self._homes[problem]
        self._cancel_parts(problem)
        self._drop(problem, answer)

    def _suspect(self, problem: int) -> bool:
        """Whether a problem must run alone."""
        return self._failures[problem] >= SUSPECT

    def _drop(self, problem: int, answer: Answer) -> None:
        """Forget a problem that no replica has, and report its answer."""
        self._parts_of.pop(problem, None)
        self._failures.pop(problem, None)
        if self._moves:
            self._moves.forget(problem)
        self._on_answer(answer)

    def _cancel_parts(self, problem: int, round_: int | None = None) -> None:
        """End the parts of a problem, or those of one of its rounds: nothing waits for them."""
        for task in list(self._returned):
            if task.key.problem == problem and task.part and round_ in (None, task.part.round):
                self._returned.remove(task)
        for key in self._parts_of.get(problem, ()):
            number = self._parts.get(key, -1)
            replica = self._replicas.get(number)
            if replica is None:
                continue
            part = replica.tasks[key].part
            if round_ is None or (part and part.round == round_):
                del self._parts[key], replica.tasks[key]
                undelivered = [task for task in replica.outbox.tasks if task.key == key]
                for task in undelivered:
                    replica.outbox.tasks.remove(task)
                    replica.coming.difference_update(_places(task))
                if not undelivered:
                    replica.outbox.cancel.append(key)
                self._wake(number)

    def _balance(self, moves: TailMoves) -> None:
        """Order the moves that pay now, between replicas without unfinished moves."""
        ready = {
            n: r
            for n, r in self._replicas.items()
            if r.state is not None and not r.leaving and not r.coming
            if not any(self._suspect(key.problem) for key in r.tasks)
        }
        measured = [r.state.cost for r in ready.values() if r.state and r.report.measured]
        if len(ready) < 2 or not measured:
            return
        for replica in ready.values():  # one that has just begun is taken to be like another
            if replica.state and not replica.report.measured:
                replica.state = replace(replica.state, cost=measured[0])
        for move in moves.moves({n: r.state for n, r in ready.items() if r.state}):
            source, target = self._replicas[move.source], self._replicas[move.target]
            source.outbox.detach.append((move.problem, move.round, move.indices))
            places = {Place(move.problem, move.round, index) for index in move.indices}
            source.leaving |= places
            target.coming |= places
            self._targets |= dict.fromkeys(places, move.target)
            self._wake(move.source)

    def _give_up_move(self, place: Place) -> None:
        """A rollout does not leave, or is not needed where it goes. Does nothing if it has left."""
        target = self._replicas.get(self._targets.pop(place, -1))
        if target is not None:
            target.coming.discard(place)

    def _forward(self, problem: int, round_: int, partials: Mapping[int, Partial]) -> None:
        """Send rollouts that have left a replica to the one that they are moving to."""
        home = self._homes.get(problem)
        targets: dict[int, dict[int, Partial]] = {}
        for index, partial in partials.items():
            place = Place(problem, round_, index)
            if home is None:
                self._give_up_move(place)
            target = self._targets.pop(place, -1)
            targets.setdefault(target, {})[index] = partial
        if home is None:
            return
        task = self._replicas[home].tasks[Key(problem)]
        known = [result for result in self._known(task.id) if result.round < round_]
        for target, rollouts in targets.items():
            self._num_parts += 1
            key = Key(problem, self._num_parts)
            self._parts_of.setdefault(problem, []).append(key)
            moved = replace(task, key=key, known=known, part=Part(round_, rollouts))
            self.moved += len(rollouts)
            if target in self._replicas:
                self._assign(target, moved)
            else:
                self._returned.append(moved)
                self._wake_all()

    def _shrink(self, key: Key, indices: Collection[int]) -> None:
        """Rollouts of a part have ended or moved on: they are not run again if it is lost."""
        if key not in self._parts:
            return
        tasks = self._replicas[self._parts[key]].tasks
        part = tasks[key].part
        assert part is not None
        left = {index: r for index, r in part.rollouts.items() if index not in indices}
        tasks[key] = replace(tasks[key], part=replace(part, rollouts=left))

    def _wake(self, number: int) -> None:
        if not self._replicas[number].calling:
            self._due[number] = None

    def _wake_all(self) -> None:
        for number in self._replicas:
            self._wake(number)


def _places(task: Task) -> set[Place]:
    """The rollouts of a part."""
    if task.part is None:
        return set()
    return {Place(task.key.problem, task.part.round, index) for index in task.part.rollouts}
