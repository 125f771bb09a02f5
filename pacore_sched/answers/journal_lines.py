"""The lines of a run journal: finished rollouts, and the checks of lines that are read back.

A journal may have been edited, merged or damaged. A line that passes `check_line` is one that the
resumed run could have written itself.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from model.errors import shown

FINISH_REASONS = ("stop", "length", "cancelled", "error")


@dataclass(frozen=True)
class RolloutResult:
    """A finished rollout. `tokens` and `logprobs` are empty if the journal keeps only the text.

    `cut` and `dropped` are indices of the previous round's rollouts whose messages were shortened,
    or left out of, this rollout's prompt: ascending.
    """

    problem: str
    round: int
    index: int
    seed: int
    prompt_tokens: int
    finish_reason: str
    text: str
    num_tokens: int
    logprob: float  # of all tokens, summed; raw or processed, as `Sampling.logprobs` says
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    cut: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()

    def record(self, *, tokens: bool = False) -> dict:
        """The journal line; with `tokens`, it has every token and its log-probability."""
        fields = asdict(self)
        if not tokens:
            del fields["tokens"], fields["logprobs"]
        return {"kind": "rollout", **fields}

    @staticmethod
    def of_record(record: Mapping) -> "RolloutResult":
        """The result in a journal line."""
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in record.items()
            if key != "kind"
        }
        return RolloutResult(**values)


@dataclass(frozen=True)
class Expected:
    """What the lines of a run's journal must agree with.

    image_files: every problem's id, with its number of image files; None if its question is
        invalid now, as when an image is gone
    widths: the rollouts of every round, the synthesis included
    seed: maps a rollout's round, index and problem to its seed
    tokens: whether the lines have every token and its log-probability
    cancels: whether rounds may cancel rollouts
    """

    image_files: Mapping[str, int | None]
    widths: Sequence[int]
    seed: Callable[[int, int, str], int]
    tokens: bool = False
    cancels: bool = False


def check_line(record: Mapping, expected: Expected) -> None:
    """Raise ValueError, which says why, unless the run could have written this line."""
    kind = record.get("kind")
    if not (isinstance(kind, str) and kind in _FIELDS):
        raise ValueError(f"kind {shown(kind)} must be one of {', '.join(_FIELDS)}")
    fields = dict(_FIELDS[kind])
    if kind == "rollout" and expected.tokens:
        fields |= _TOKEN_FIELDS
    for key in record:
        if key not in fields and key != "kind":
            raise ValueError(f"a line of kind {kind} has no key {shown(key)}")
    for key, (is_valid, meaning) in fields.items():
        if key not in record:
            raise ValueError(f"{key} is missing")
        if not is_valid(record[key]):
            raise ValueError(f"{key} {shown(record[key])} must be {meaning}")
    if record["problem"] not in expected.image_files:
        raise ValueError(f"there is no problem {shown(record['problem'])}")
    if kind == "rollout":
        _check_rollout(record, expected)
    if kind == "images":
        files, hashes = expected.image_files[record["problem"]], record["sha256"]
        if files not in (None, len(hashes)):
            raise ValueError(
                f"sha256 must have {files} elements, one per image file, and has {len(hashes)}"
            )


def _check_rollout(record: Mapping, expected: Expected) -> None:
    widths, number, index = expected.widths, record["round"], record["index"]
    if number >= len(widths):
        raise ValueError(f"round {number} must be below {len(widths)}, the number of rounds")
    if index >= widths[number]:
        raise ValueError(f"index {index} must be below {widths[number]}, the round's width")
    seed = expected.seed(number, index, record["problem"])
    if record["seed"] != seed:
        raise ValueError(f"seed {record['seed']} must be {seed}")
    for key in _TOKEN_FIELDS if expected.tokens else ():
        if len(record[key]) != record["num_tokens"]:
            raise ValueError(
                f"{key} must have {record['num_tokens']} elements, as num_tokens says, and has"
                f" {len(record[key])}"
            )
    reason = record["finish_reason"]
    if reason in ("error", "cancelled") and record["text"]:
        raise ValueError(f"text must be empty, as finish_reason is {reason}")
    if reason == "cancelled" and not expected.cancels:
        raise ValueError("finish_reason is cancelled, but every round waits for all its rollouts")
    messages = widths[number - 1] if number else 0
    for key in ("cut", "dropped"):
        if any(message >= messages for message in record[key]):
            raise ValueError(
                f"{key} {shown(record[key])} must be below {messages}, the messages that the round"
                " reads"
            )


def _is_text(value: object) -> bool:
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can express
        return False


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0  # True is an int


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and -math.inf < value < math.inf  # type: ignore[operator]


def _is_ascending(value: object) -> bool:
    return _is_list(value, _is_count) and value == sorted(set(value))  # type: ignore[call-overload]


def _is_list(value: object, is_valid: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and all(map(is_valid, value))


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef")


_TEXT = _is_text, "a string of valid Unicode"
_COUNT = _is_count, "an integer, at least 0"
_INDICES = _is_ascending, "a list of ascending integers, at least 0"

# kind -> key -> whether a value is valid, and what it must be
_FIELDS: dict[str, dict[str, tuple[Callable[[object], bool], str]]] = {
    "rollout": {
        "problem": _TEXT,
        "round": _COUNT,
        "index": _COUNT,
        "seed": _COUNT,
        "prompt_tokens": _COUNT,
        "finish_reason": (FINISH_REASONS.__contains__, f"one of {', '.join(FINISH_REASONS)}"),
        "text": _TEXT,
        "num_tokens": _COUNT,
        "logprob": (_is_finite, "a finite number"),
        "cut": _INDICES,
        "dropped": _INDICES,
    },
    "images": {
        "problem": _TEXT,
        "sha256": (lambda value: _is_list(value, _is_sha256), "a list of SHA-256 in hexadecimal"),
    },
    "answer": {
        "problem": _TEXT,
        "answer": _TEXT,
        "error": (lambda value: value is None or _is_text(value), "a string or null"),
    },
}
_TOKEN_FIELDS = {
    "tokens": (lambda value: _is_list(value, _is_count), "a list of integers, at least 0"),
    "logprobs": (lambda value: _is_list(value, _is_finite), "a list of finite numbers"),
}
