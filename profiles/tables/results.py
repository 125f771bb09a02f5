"""The tables of measured results, on docs/results.md and README: their rows, columns and labels.

GPUs need no entry here: every folder under profiles/results/ with rows of one becomes tables.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from bench.rows import jsonl
from bench.rows.columns import Column, Table, make_table, markdown
from bench.rows.formats import number, whole
from profiles.tables.figures import Row, folder, latest_row, milliseconds, small, spread
from profiles.tables.gpu import gpus
from profiles.tables.in_transformers import dispatch, generations
from profiles.tables.kernels import DECODE_KERNELS, VISION_KERNELS, Kernel, kernel_table

PROFILES = Path(__file__).parents[1]
RESULTS = PROFILES / "results"
OPS_CPU = RESULTS / "amd-epyc-avx512-2-threads"  # of ops, and of models end to end
FOLD_CPU = ENGINE_CPU = RESULTS / "amd-epyc-avx2-2-threads"
SIMULATED = PROFILES / "simulated" / "h200.jsonl"
STATIC = PROFILES / "static" / "baseline.jsonl"
VERSIONS = PROFILES.parent / ".ci" / "versions.jsonl"

measured = cache(folder)
recorded = cache(jsonl.read)


class DecodeCase(NamedTuple):
    """A line of the decode table and of the decode plot."""

    label: str
    plot_label: str
    case: str


DECODE_CASES = (
    DecodeCase(
        "32/8 heads of 128, 16 rollouts, prefix 2,048, suffix 128",
        "16 rollouts, prefix 2,048, suffix 128 (32/8 heads of 128)",
        "B16 P2048 S128",
    ),
    DecodeCase(
        "32/8 heads of 128, 4 groups of 4 rollouts, prefix 512, suffix 64",
        "4 groups of 4 rollouts, prefix 512, suffix 64 (32/8 heads of 128)",
        "4 x (B4 P512 S64)",
    ),
    DecodeCase(
        "9/3 heads of 64, 16 rollouts, prefix 1,500, suffix 64",
        "16 rollouts, prefix 1,500, suffix 64 (9/3 heads of 64)",
        "smollm2 B16 P1500 S64",
    ),
)
DECODE_FORMS = {" eager": "eager", " SDPA": "sdpa", " ours": "portable"}  # column, impl


def cpu_decode_rows() -> list[tuple[DecodeCase, list[Row]]]:
    """The CPU's rows of each decode case: eager, SDPA, ours."""
    rows = measured(OPS_CPU)
    return [
        (
            case,
            [
                latest_row(rows, op="prefix_attention", case=case.case, impl=impl, dtype="float32")
                for impl in DECODE_FORMS.values()
            ],
        )
        for case in DECODE_CASES
    ]


def decode() -> str:
    """prefix_attention compared with eager and with SDPA."""
    lines = [
        [case.label, *map(spread, rows), f"{rows[-1]['roofline_pct']:.0f} %"]
        for case, rows in cpu_decode_rows()
    ]
    label = "decode attention, median ms (p20..p80)"
    return markdown(Table("", (label, *DECODE_FORMS, " ours, roofline %"), lines))


class EndToEndRow(NamedTuple):
    """A line of the end-to-end table: the rate called `rate`, or the time if that is None."""

    label: str
    op: str
    case: str
    rate: str | None = None


END_TO_END = (
    EndToEndRow(
        "SmolLM2, prompt of 1,481 tokens, width 16, up to 32 tokens: whole answer",
        "pacore",
        "smollm2-135m P1481 W16 T32",
        "tokens_per_second",
    ),
    EndToEndRow(
        "the decode steps of its 16 rollouts alone",
        "pacore",
        "smollm2-135m P1481 W16 T32",
        "decode_tokens_per_second",
    ),
    EndToEndRow("`tiny`, photo of 1280 x 720 to first logits", "photo", "tiny 6 crops, 98 tokens"),
    EndToEndRow("`tiny`, image of 728 x 728 (1 view) to embeddings", "vision", "tiny 728 x 728"),
    EndToEndRow(
        "`tiny`, image of 1920 x 1080 (9 views) to embeddings", "vision", "tiny 1920 x 1080"
    ),
    EndToEndRow(
        "`tiny`, image of 3024 x 3024 (37 views) to embeddings", "vision", "tiny 3024 x 3024"
    ),
)


def end_to_end() -> str:
    """Whole runs, with all ops eager and with our default impls."""
    lines = []
    for line in END_TO_END:
        eager, ours = (
            latest_row(measured(OPS_CPU), op=line.op, case=line.case, impl=impl)
            for impl in ("eager", "default")
        )
        if line.rate:
            cells = [f"{row[line.rate]:,.1f} tokens/s" for row in (eager, ours)]
            gain = ours[line.rate] / eager[line.rate]
        else:
            cells = [f"{milliseconds(row['median_us'])} ms" for row in (eager, ours)]
            gain = eager["median_us"] / ours["median_us"]
        lines.append([line.label, *cells, f"{gain:.1f}x"])
    return markdown(Table("", ("whole run", " eager", " ours", " speed-up"), lines))


class ModelRow(NamedTuple):
    """A line of the table of other libraries: the median time of a row, or its `rate`."""

    label: str
    op: str
    case: str
    rate: str | None = None


MODEL_ROWS = (
    ModelRow(
        "decode step, 16 rollouts, 512 + 64 tokens, ms", "decode_step", "smollm2-135m B16 P512 S64"
    ),
    ModelRow(
        "decode step, 16 rollouts, 2,048 + 64 tokens, ms",
        "decode_step",
        "smollm2-135m B16 P2048 S64",
    ),
    ModelRow(
        "prompt of 512 tokens, tokens/s", "prefill", "smollm2-135m N512", rate="tokens_per_second"
    ),
    ModelRow(
        "prompt of 2,048 tokens, tokens/s",
        "prefill",
        "smollm2-135m N2048",
        rate="tokens_per_second",
    ),
    ModelRow(
        "whole answer: prompt of 1,481 tokens, width 16, 32 tokens, tokens/s",
        "pacore",
        "smollm2-135m P1481 W16 T32",
        rate="tokens_per_second",
    ),
)
MODEL_FORMS = {
    " eager": ("eager", "float32"),
    " ours": ("default", "float32"),
    " ours, bf16": ("default", "bfloat16"),
    " llama.cpp": ("llama.cpp", "float32"),
    " transformers": ("transformers", "float32"),
}


def models_on_cpu() -> str:
    """SmolLM2 by our forms and by other libraries; a cell without a row stays empty."""
    rows = measured(OPS_CPU)

    def cell(line: ModelRow, impl: str, dtype: str) -> str:
        wanted = {"op": line.op, "case": line.case, "impl": impl, "dtype": dtype}
        if not any(wanted.items() <= row.items() and not row.get("failure") for row in rows):
            return ""
        row = latest_row(rows, **wanted)
        return f"{row[line.rate]:,.0f}" if line.rate else spread(row)

    lines = [
        [line.label, *(cell(line, *form) for form in MODEL_FORMS.values())] for line in MODEL_ROWS
    ]
    return markdown(Table("", ("SmolLM2-135M", *MODEL_FORMS), lines))


FOLDED = (  # heading, field, format
    (" max error", "max_err", small),
    (" RMS error", "rms_err", small),
    (" multiply-adds, one global view", "products", number(".1f", per=1e9, unit=" G")),
    (" weights", "bytes", number(".0f", per=1e6, unit=" MB")),
)
FOLD_COLUMNS = (
    Column("dtype", "label"),
    *(
        Column(name, f"{path}_{field}", write)
        for heading, field, write in FOLDED
        for name, path in ((heading, "unfolded"), (" folded", "folded"))
    ),
)


def fold() -> str:
    """The projector's last two layers, as published and folded."""
    rows = [
        {"label": label, **latest_row(measured(FOLD_CPU), op="fold", dtype=dtype)}
        for label, dtype in (("bf16", "bfloat16"), ("fp16", "float16"))
    ]
    return markdown(make_table("", FOLD_COLUMNS, rows))


PACKING = {  # label, form
    "one problem at a time": "one-at-a-time, up to 64 rollouts",
    "later-round-first, all at once": "later-round-first, up to 64 rollouts",
    "later-round-first, all at once, drafts at 8 rollouts or fewer": (
        "later-round-first, up to 64 rollouts, drafts at 8 or fewer"
    ),
    "fcfs, at most 16 rollouts": "fcfs, up to 16 rollouts",
    "later-round-first, at most 16 rollouts": "later-round-first, up to 16 rollouts",
    "shortest-expected, at most 16 rollouts": "shortest-expected, up to 16 rollouts",
}


PACKING_COLUMNS = (
    Column("8 problems of width 8", "label"),
    Column(" makespan, s", "makespan_s", number(".1f")),
    Column(" mean time to answer, s", "tta_mean_s", number(".1f")),
    Column(" tokens/s", "tokens_per_second", number(".1f")),
    Column(" steps", "steps", whole),
)


def packing() -> str:
    """Eight problems on one engine, under several policies."""
    case = "smollm2-135m 8 x [8] T128"
    rows = [
        {"label": label, **latest_row(measured(ENGINE_CPU), op="packing", case=case, impl=impl)}
        for label, impl in PACKING.items()
    ]
    return markdown(make_table("", PACKING_COLUMNS, rows))


NEEDLE_LENGTHS = (2048, 8192, 12_288, 16_384)
NEEDLE_FORMS = {
    "none": "none",
    "YaRN": "yarn",
    "YaRN without its attention temperature": "yarn-no-temperature",
    "position interpolation": "linear",
}


def needles() -> str:
    """Needles found in haystacks of several lengths, by rope scaling; "" where none was tried."""
    rows = [row for row in measured(ENGINE_CPU) if row["op"] == "needle"]

    def cell(tokens: int, impl: str) -> str:
        case = f"smollm2-135m T{tokens}"
        texts = [
            f"{row['found']} of {row['asked']}"
            for row in rows
            if (row["case"], row["impl"]) == (case, impl)
        ]
        return texts[-1] if texts else ""

    lines = [
        [label, *(cell(tokens, impl) for tokens in NEEDLE_LENGTHS)]
        for label, impl in NEEDLE_FORMS.items()
    ]
    header = (
        "needles found, by tokens of the text",
        *(f" {tokens:,}" for tokens in NEEDLE_LENGTHS),
    )
    return markdown(Table("", header, lines))


WORKLOADS = ("vqa", "vl", "math", "high")
DEFAULT, SHORTEST = "later-round-first", "shortest-expected"


def simulated_row(workload: str, policy: str, **variant: object) -> Row:
    """One GPU, sigma_w 0.55, bf16 KV and shared reads; `variant` overrides any of these."""
    usual = {"sigma_w": 0.55, "gpus": 1, "shared_reads": True, "kv_dtype": "bf16"}
    return latest_row(recorded(SIMULATED), workload=workload, policy=policy, **usual | variant)


def minutes(workload: str, policy: str, **variant: object) -> str:
    """Mean time to answer / makespan, in minutes."""
    row = simulated_row(workload, policy, **variant)
    return f"{row['tta_mean_s'] / 60:,.1f} / {row['makespan_s'] / 60:,.1f}"


def gain(workload: str, policy: str, base: str) -> str:
    """The times of policy `base` over those of `policy`."""
    ours, other = simulated_row(workload, policy), simulated_row(workload, base)
    return " / ".join(f"{other[name] / ours[name]:.2f}" for name in ("tta_mean_s", "makespan_s"))


def preemptions(workload: str, *policies: str) -> str:
    rows = (simulated_row(workload, policy) for policy in policies)
    return " / ".join(f"{row['preemptions']:,.0f}" for row in rows)


SIMULATED_LINES: dict[str, Callable[[str], str]] = {
    "later-round-first (default)": partial(minutes, policy=DEFAULT),
    "shortest-expected: learns lengths from finished siblings": partial(minutes, policy=SHORTEST),
    "fcfs, with vLLM's admission": partial(minutes, policy="fcfs"),
    "one-at-a-time: one problem after the other": partial(minutes, policy="one-at-a-time"),
    "oracle: knows every length, never preempts": partial(minutes, policy="oracle"),
    "oracle-shortest: the same, shortest problem first": partial(minutes, policy="oracle-shortest"),
    "times better: later-round-first over fcfs": partial(gain, policy=DEFAULT, base="fcfs"),
    "times better: later-round-first over one-at-a-time": partial(
        gain, policy=DEFAULT, base="one-at-a-time"
    ),
    "times better: later-round-first over oracle": partial(gain, policy=DEFAULT, base="oracle"),
    "times better: shortest-expected over fcfs": partial(gain, policy=SHORTEST, base="fcfs"),
    "preemptions: later-round-first / fcfs": lambda w: preemptions(w, DEFAULT, "fcfs"),
    "later-round-first, every rollout reads its whole prompt itself": partial(
        minutes, policy=DEFAULT, shared_reads=False
    ),
    "later-round-first, FP8 KV": partial(minutes, policy=DEFAULT, kv_dtype="fp8"),
    "shortest-expected, FP8 KV": partial(minutes, policy=SHORTEST, kv_dtype="fp8"),
}


def simulated() -> str:
    """Policies in the simulator, a column per workload."""
    lines = [[label, *map(cell, WORKLOADS)] for label, cell in SIMULATED_LINES.items()]
    header = ("mean time to answer / makespan, minutes", *(f" {w}" for w in WORKLOADS))
    return markdown(Table("", header, lines))


def compiled(kernels: Sequence[Kernel]) -> str:
    """The compiler's output for `kernels`."""
    return kernel_table(kernels, recorded(STATIC))


VERSION_COLUMNS = (
    Column("Python", "python"),
    Column("PyTorch", "torch"),
    Column("Triton", "triton"),
    Column("NumPy", "numpy"),
    Column(" passed", "passed", whole),
    Column(" failed", lambda row: row["failed"] + row["error"], whole),
    Column(" skipped", "skipped", whole),
    Column("kernels for sm_80 and sm_90", "static"),
    Column("commit and date", lambda row: f"{row['commit']}, {row['date']}"),
)


def versions(file: Path = VERSIONS) -> str:
    """The Pythons and PyTorches that the tests have run with, from `.ci/versions.py`."""
    return markdown(make_table("", VERSION_COLUMNS, recorded(file)))


TABLES: dict[str, Callable[[], str]] = {
    "decode": decode,
    "end to end": end_to_end,
    "models on a CPU": models_on_cpu,
    "gpus": lambda: gpus(RESULTS),
    "kernels of the decode path": lambda: compiled(DECODE_KERNELS),
    "fold": fold,
    "generate": lambda: generations(measured(ENGINE_CPU)),
    "dispatch": lambda: dispatch(measured(ENGINE_CPU)),
    "kernels of the vision path": lambda: compiled(VISION_KERNELS),
    "needles": needles,
    "packing": packing,
    "versions": versions,
    "simulated": simulated,
}
