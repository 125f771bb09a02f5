"""The decision table of first-light: every answer from hand-made rows, and missing rows."""

import json
import re
from pathlib import Path

import pytest

from bench.measure import pairs
from bench.rows import jsonl
from bench.studies import linears
from model.errors import InputError
from profiles import __main__ as command
from profiles.first_light import decision_table
from profiles.first_light.decision_table import BATCHES, FP8_CASE, TABLE, decisions, latest
from profiles.first_light.line_fit import fit
from profiles.runs.task import Row

COPY = 2000.0  # GB/s: 2e9 bytes in a millisecond
MB = 1_000_000
CASES = {  # of attention, with their bytes
    "B16 P2048 S128": 20 * MB,
    "B16 P2048 S512": 40 * MB,
    "B16 P32768 S2048": 300 * MB,
    "B64 P512 S128": 40 * MB,
    "B64 P2048 S8192": 2000 * MB,
}
ORIGIN = {"device": "H100", "commit": "abc", "schema": 1}


def row(section: str, op: str, case: str, us: float, **more: object) -> Row:
    made = {"section": section, "op": op, "case": case, "dtype": "bfloat16", "impl": "triton"}
    return made | {"median_us": us, "copy_gb_s": COPY, "failure": None} | ORIGIN | more


def pair(case: str, form: str, us: float, op: str = "prefix_attention", **more: object) -> Row:
    impl = "triton" if form == "rule" else f"triton {form.replace(' ', '=')}"
    known = {"impl": impl, "pair": form, "tiles": {}, "bytes": CASES.get(case, MB)}
    return row("pairs", op, case, us, **known | more)


def attention(w16: float, w64: float, a: float = 5.0, form: str = "ahead 1") -> list[Row]:
    """Times on two lines whose rates are percentages of the copy bandwidth."""
    percent = {"B16": w16, "B64": w64}
    return [
        pair(case, form, a + num_bytes / (percent[case[:3]] / 100 * COPY * 1e3))
        for case, num_bytes in CASES.items()
    ]


def switched(*percent: float) -> list[Row]:
    """Cases of which `ahead` saves the given percentages of the time."""
    return [
        pair(case, f"ahead {new}", 100 - new * saved)
        for case, saved in zip(CASES, percent, strict=False)
        for new in (0, 1)
    ]


def linear(percent: float, rows: int = 16) -> list[Row]:
    """A step whose products all reach `percent` of the copy bandwidth, except a slow, small one."""
    made = []
    for name in linears.NAMES:
        share = percent / (10 if name == "o" else 1)
        num_bytes = MB // 1000 if name == "o" else 100 * MB
        more = {
            "rows": rows,
            "per_step": 36,
            "bytes": num_bytes,
            "copy_pct": share,
            "impl": "torch",
        }
        us = num_bytes / (share / 100 * COPY * 1e3)
        made.append(row("linears", "linear", linears.case_name(name, rows), us, **more))
    return made


def vision(tflop_s: float, turn_q: int = 0) -> list[Row]:
    """Attention at this rate after a rotation of 100 MB; of half as much with turn_q."""
    rotation_us = 100 * MB / (1 + turn_q) / COPY / 1e3
    us = rotation_us + 1e11 / tflop_s / 1e6
    more = {"flops": 1e11, "bytes": 100 * MB, "tiles": {"turn_q": turn_q}}
    return [pair("views", "rule", us, "vision_attention", **more)]


def fp8(bf16: float, plain: float, fp16: float | None) -> list[Row]:
    found = [pair(FP8_CASE, "rule", bf16), pair(f"{FP8_CASE} fp8", "rule", plain)]
    return found + ([pair(f"{FP8_CASE} fp8", "fp16 1", fp16)] if fp16 else [])


def checked(*failures: str | None, section: str = "numerics", impl: str = "triton") -> list[Row]:
    return [row("numerics", "rms_norm", "fine", 0.0)] + [
        row(section, "sample", f"case {at}", 0.0, failure=failure, impl=impl)
        for at, failure in enumerate(failures)
    ]


ANSWERS = {
    "wrong numbers or hangs": [
        (checked(), "none -> go on"),
        (checked("max error 1"), "1 (sample) -> run the smallest"),
        (checked("no answer within 20 s: killed", "off"), "2 (sample) -> run the smallest"),
        (checked("off", section="pairs", impl="triton pdl=1"), "1 (sample) -> run the smallest"),
        (checked("not started: out of time"), "none -> go on"),
        (checked("cannot take this", impl="sdpa-flash"), "none -> go on"),
    ],
    "rate of decode attention": [
        (attention(85.1, 90), "B16 1,702 GB/s (85 %), B64 1,800 GB/s (90 %) -> fine"),
        (attention(86, 84), "-> launch the tiles of 16 rows separately"),
        (attention(84, 86), "-> profile the loop"),
        (attention(60, 60), "-> profile the loop"),
        (attention(60, 60, form="rule") + attention(90, 90), "-> fine"),
        (attention(60, 60, form="rule"), "-> profile the loop"),  # without rows of `ahead`
    ],
    "fixed cost": [
        (attention(90, 90, a=5.9), "B16 5.9 us, B64 5.9 us -> fine"),
        (attention(90, 90, a=6.2), "B16 6.2 us, B64 6.2 us -> once the rate is fine: `pieces`"),
    ],
    "gain from loading": [
        (switched(2.9, -4), "-4.0 to +2.9 %, cases: 2 -> CTAs do not wait for this"),
        (switched(2.9, 3.1, 1), "+1.0 to +3.1 %, cases: 3 -> keep `ahead`, and drop the old form"),
    ],
    "launch in a graph": [
        ([row("launches", "launch", "100", 2.49)], "2.49 us -> launches are cheap"),
        ([row("launches", "launch", "100", 2.51)], "2.51 us -> earlier starts"),
    ],
    "linear layers": [
        (linear(88.5), "16 rows 88 % (o T16 9 %) -> leave them"),
        (linear(88.5) + linear(60, 64), "16 rows 88 %, 64 rows 60 % (o T16 9 %) -> leave them"),
        (linear(87.9), "-> write a product that streams"),
    ],
    "vision attention": [
        (vision(399), "399 TFLOP/s without its rotation -> profile it"),
        (vision(401), "-> tune its kernel config"),
        (vision(479, turn_q=1), "479 TFLOP/s without its rotation -> tune its kernel config"),
        (vision(481), "-> only the rotation of Q"),
    ],
    "attention over FP8 KV": [
        (fp8(20, 19, 15), "19.0 us, 15.0 us with products in fp16; bf16 20.0 us -> keep FP8"),
        (fp8(20, 21, 19), "-> make products in fp16"),
        (fp8(20, 23, 21), "-> try products in fp16 if not yet tried; otherwise bf16 KV below 8k"),
        (fp8(20, 23, None), "23.0 us; bf16 20.0 us -> try products in fp16 if not yet tried"),
    ],
}


@pytest.mark.parametrize(
    ("question", "rows", "answer"),
    [(question, *one) for question, of in ANSWERS.items() for one in of],
)
def test_each_answer(question: str, rows: list[Row], answer: str):
    """Guards every limit of the table from both sides, and the text with the numbers."""
    (line,) = (line for line in decisions(rows) if line.startswith(question))
    assert answer in line


def test_every_question_is_tested():
    """Guards against a question of the table that the test above does not cover."""
    for decision in TABLE:
        assert any(decision.question.startswith(question) for question in ANSWERS)


def test_missing_rows():
    """Guards an unfinished run: a question that was not measured, or only in part, says so."""
    assert decisions([]) == [f"{decision.question}: not measured" for decision in TABLE]
    partial = {
        "rate": [one for one in attention(90, 90) if one["case"] != "B64 P2048 S8192"],
        "fixed": attention(90, 90)[:1],
        "gain": [one for one in switched(5) if one["pair"] == "ahead 1"],
        "linear": linear(90)[1:] + linear(90, 32),
        "attention over": fp8(20, 19, 15)[1:],
        "launch": [row("launches", "launch", "100", None, failure="no answer")],
    }
    for question, rows in partial.items():
        (line,) = (line for line in decisions(rows) if line.startswith(question))
        assert line.endswith(": not measured")


def test_wrong_forms_decide_nothing():
    """Guards against choosing a new form that is fast because it is wrong (it was timed anyway)."""
    wrong = [
        one | {"failure": "max error 1"} if one["pair"] == "ahead 1" else one
        for one in switched(40)
    ]
    assert f"{TABLE[3].question}: not measured" in decisions(wrong)


def test_the_last_row_counts():
    """Guards a second run: a later good row replaces a failure, also one of a task as a whole."""
    old, new = row("ops", "a", "b", 1.0, failure="off"), row("ops", "a", "b", 2.0)
    assert latest([old, new]) == [new] and latest([new, old]) == [old]
    whole = row("ops", "a", "b", None, impl=None, failure="killed")
    assert latest([whole, new]) == [new] and latest([new, whole]) == [new, whole]


def test_fit():
    """Guards the fit against hand-computed lines: exact through two points, least squares through
    three, None without a rate."""
    line = fit([(1 * MB, 5.0), (3 * MB, 9.0)])
    assert (line.start_us, line.gb_s) == (pytest.approx(3), pytest.approx(500))
    line = fit([(0, 0.0), (1 * MB, 2.0), (2 * MB, 1.0)])
    assert (line.start_us, line.gb_s) == (pytest.approx(0.5), pytest.approx(2000))
    for points in ([], [(MB, 1.0)], [(MB, 1.0), (MB, 2.0)], [(MB, 2.0), (2 * MB, 1.0)]):
        assert fit(points) is None


def test_names_are_those_that_are_measured():
    """Guards against names in the table that no task has: it would find no rows."""
    of_gpu = pairs.PAIRS["cuda"]
    switches = {name for of_case in of_gpu.values() for name in of_case}
    texts = [text for decision in TABLE for _, text in decision.rules]
    named = {name for text in texts for name in re.findall(r"`(\w+)", text)}
    assert named <= switches and {"ahead", "fp16"} <= switches
    assert {"ahead"} <= of_gpu["prefix_attention", FP8_CASE].keys()
    assert of_gpu["prefix_attention", f"{FP8_CASE} fp8"].keys() == {"fp16"}
    attention_cases = [case for op, case in of_gpu if op == "prefix_attention"]
    counts = [
        sum(
            decision_table._decodes({"op": "prefix_attention", "case": case}, batch)
            for case in attention_cases
        )
        for batch in BATCHES
    ]
    assert counts == [3, 2]
    assert len(linears.NAMES) == 5


def test_command(tmp_path: Path, capsys):
    """Guards `decisions DIR`: only rows of the last device and commit count; both tables appear."""
    with pytest.raises(InputError, match="has no rows"):
        command.main(["decisions", str(tmp_path)])
    old = [one | {"commit": "old"} for one in [*linear(50), *attention(50, 50)]]
    jsonl.append(tmp_path / "rows.jsonl", [*old, *attention(90, 80, a=4.0), *switched(10)])
    assert command.main(["decisions", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["decisions"]) == len(TABLE)
    assert f"{TABLE[5].question}: not measured" in document["decisions"]
    (gain,) = document["pairs"]
    assert gain["switch"] == "ahead 0 -> 1" and gain["saves %"] == 10
    assert [(one["form"], one["rollouts"]) for one in document["lines"]] == [
        ("ahead 1", 16),
        ("ahead 1", 64),
    ]
    assert command.main(["decisions", str(tmp_path)]) == 0
    assert "what a switch gains" in capsys.readouterr().out


def test_rows_without_fields_name_the_line(tmp_path: Path):
    """A KeyError's traceback for rows of another kind."""
    path = tmp_path / "rows.jsonl"
    for name in ("device", "copy_gb_s", "failure"):
        rows = [*attention(90, 80, a=4.0), *switched(10)]
        path.write_text("".join(json.dumps(r) + "\n" for r in (without(r, name) for r in rows)))
        with pytest.raises(InputError, match=rf"rows\.jsonl:\d+: the row has no '{name}'"):
            command.main(["decisions", str(tmp_path)])


def without(row: dict, name: str) -> dict:
    return {key: value for key, value in row.items() if key != name}
