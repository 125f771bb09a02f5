"""What the lines of a run journal hold: which rollouts, and where; images; answers."""

from collections.abc import Mapping

from model.errors import shown
from pacore_sched.answers.journal_lines import Expected, check_line


class JournalIndex:
    """The lines so far, without the header.

    rollouts: how many
    offsets: problem -> (round, index) -> byte offset of the rollout's line
    images: problem -> SHA-256 of its image files
    errors: answered problem -> its error
    begun: the images of the last line, which are written together with the rollout that follows
    """

    def __init__(self, expected: Expected) -> None:
        self.rollouts = 0
        self.offsets: dict[str, dict[tuple[int, int], int]] = {}
        self.images: dict[str, list[str]] = {}
        self.errors: dict[str, str | None] = {}
        self._prompts: dict[tuple[str, int], tuple] = {}  # of each problem and round
        self.begun: Mapping | None = None
        self._expected = expected

    def add(self, record: Mapping, offset: int) -> None:
        """Add a line that begins at byte `offset`."""
        kind, problem = record["kind"], record["problem"]
        if kind == "images":
            self.begun = record
            return
        if kind == "answer":
            self.errors[problem] = record["error"]
            return
        if self.begun:
            self.images[problem], self.begun = self.begun["sha256"], None
        self.offsets.setdefault(problem, {})[record["round"], record["index"]] = offset
        self._prompts[problem, record["round"]] = _prompt(record)
        self.rollouts += 1

    def check(self, record: Mapping) -> None:
        """Raise ValueError, which says why, unless the run could have written this line next."""
        check_line(record, self._expected)
        kind, problem = record["kind"], record["problem"]
        name = f"problem {shown(problem)}"
        if self.begun and (kind, problem) != ("rollout", self.begun["problem"]):
            raise ValueError(f"a rollout of problem {shown(self.begun['problem'])} must follow")
        if kind == "images" and problem in self.offsets:
            raise ValueError(f"the images of {name} must be before its first rollout, and once")
        if kind == "answer" and self.errors.get(problem, "") is None:
            raise ValueError(f"{name} has an answer already")
        if kind == "rollout":
            if (record["round"], record["index"]) in self.offsets.get(problem, ()):
                raise ValueError(
                    f"rollout {record['index']} of round {record['round']} of {name} is there"
                    " already"
                )
            before = self._prompts.get((problem, record["round"]), _prompt(record))
            if before != _prompt(record):
                raise ValueError(
                    f"prompt_tokens, cut and dropped are {_prompt(record)}; other rollouts of"
                    f" round {record['round']} of {name} have {before}"
                )
            if self._expected.image_files[problem] and not (self.begun or problem in self.images):
                raise ValueError(f"the hashes of the images of {name} must be before it")


def _prompt(record: Mapping) -> tuple:
    """The fields of a rollout that all of its round share."""
    return record["prompt_tokens"], list(record["cut"]), list(record["dropped"])
