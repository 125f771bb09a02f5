"""The tables of whole runs: answers, images, engine steps, and the studies of one question each."""

from collections.abc import Iterator, Sequence

from bench.rows.columns import Column, Kind, Row
from bench.rows.formats import (
    CASE,
    DTYPE,
    ERROR,
    FAILURE,
    FORM,
    IMPL,
    MEASURED,
    POLICY,
    ROOFLINE,
    SPEEDUP,
    megabytes,
    number,
    percent,
    seconds,
    spread,
    verdict,
    whole,
    yes_no,
)
from bench.rows.replica_tables import REPLICAS
from bench.rows.schema import is_number
from bench.rows.serve_tables import SERVE

WHOLE_RUNS = Kind(
    f"end to end{MEASURED}",
    (
        *(Column("job", "op"), CASE, IMPL, DTYPE),
        Column(" seconds", "median_us", seconds),
        Column(" tokens/s", "tokens_per_second", number(".1f")),
        Column(" decoding", "decode_tokens_per_second", number(".1f")),
        *(SPEEDUP, ERROR),
        Column("", verdict(lambda row: row.get("settings")), optional=True),
    ),
)
IMAGES = Kind(
    f"images to embeddings{MEASURED}",
    (
        *(Column("image", "case"), IMPL, DTYPE),
        Column(" views", "views"),
        Column(" tokens", "tokens"),
        Column(" ms", "median_us", number(",.2f", per=1e3)),
        Column(" p20..p80", spread(number(",.2f", per=1e3))),
        Column(" TFLOP/s", "tflop_s", number(",.3f")),
        Column(" % of GEMM", "gemm_pct", number(".1f")),
        *(SPEEDUP, ERROR, FAILURE),
    ),
)
VISION_LOAD = Kind(
    f"images of many requests to embeddings{MEASURED}",
    (
        *(Column("images", "case"), Column("form", "impl"), DTYPE),
        Column(" views", "views"),
        Column(" ms", "median_us", number(",.1f", per=1e3)),
        Column(" p20..p80", spread(number(",.1f", per=1e3))),
        Column(" images/s", "images_per_second", number(",.1f")),
        Column(" TFLOP/s", "tflop_s", number(",.3f")),
        Column(" x one at a time", "packing_gain", number(".2f")),
        *(ERROR, FAILURE),
    ),
)
HOST_IMAGES = Kind(
    f"JPEGs to views, on the host{MEASURED}",
    (
        *(Column("image", "case"), Column("pool", "impl")),
        Column(" images/s", "images_per_second", number(",.1f")),
        Column(" images/s and core", "images_per_core_second", number(",.1f")),
        Column(" core ms", "core_ms", number(",.1f")),
        Column(" decode ms", "decode_ms", number(",.1f")),
        Column(" cut ms", "cut_ms", number(",.1f")),
        FAILURE,
    ),
)
ENGINE_STEPS = Kind(
    f"engine steps{MEASURED}",
    (
        *(CASE, FORM),
        Column(" step us", "median_us", whole),
        Column(" p20..p80", spread(whole)),
        *(ROOFLINE, SPEEDUP),
        Column(" tokens/s", "tokens_per_second", whole),
        Column(" host us", "host_us", whole),
        Column(" idle", "idle_pct", number(".1f", unit=" %")),
        Column("graphs", "graphs", yes_no),
        Column(" padding", "padding_pct", number(".1f", unit=" %")),
        Column(" same tokens", "same_tokens", percent(".0f")),
        FAILURE,
    ),
)


def _compared(rows: Sequence[Row]) -> Iterator[Row]:
    """The rows, each with its gains over the first row of its case."""
    first: dict[object, Row] = {}
    for row in rows:
        base = first.setdefault(row.get("case"), row)
        gains = {
            f"{name}_gain": _quotient(base, row, f"{name}_s") for name in ("makespan", "tta_mean")
        }
        yield {**row, **gains}


def _quotient(a: Row, b: Row, name: str) -> float | None:
    top, bottom = a.get(name), b.get(name)
    return top / bottom if is_number(top) and is_number(bottom) and bottom else None


def _drafts(row: Row) -> str | None:
    count = number(".0f")
    drafted = row.get("drafted")
    return f"{count(row.get('accepted'))} of {count(drafted)}" if drafted else None


MAKESPAN = Column(" makespan s", "makespan_s", number(".1f"))
TO_ANSWER = Column(" time to answer s", "tta_mean_s", number(".1f"))
PACKING = Kind(
    f"packing: {{case}}{MEASURED}",
    (
        *(POLICY, MAKESPAN, TO_ANSWER),
        Column(" tokens/s", "tokens_per_second", number(".1f")),
        Column(" steps", "steps", number(".0f")),
        Column(" x makespan", "makespan_gain", number(".2f")),
        Column(" x time to answer", "tta_mean_gain", number(".2f")),
        Column(" same texts", "same_texts", percent(".0f")),
        Column(" drafts accepted", _drafts),
        FAILURE,
    ),
    _compared,
)
REPLAY = Kind(
    f"replay: {{case}}{MEASURED}",
    (
        *(POLICY, MAKESPAN),
        Column(" simulated", "makespan_simulated_s", number(".1f")),
        Column(" error", "makespan_error", percent("+.1f")),
        TO_ANSWER,
        Column(" simulated", "tta_mean_simulated_s", number(".1f")),
        Column(" error", "tta_error", percent("+.1f")),
        Column(" TTFT s", "ttft_mean_s", number(".1f"), optional=True),
        Column(" simulated", "ttft_mean_simulated_s", number(".1f"), optional=True),
        Column(" error", "ttft_error", percent("+.1f"), optional=True),
        Column(" steps", "steps"),
        Column(" simulated", "steps_simulated"),
        FAILURE,
    ),
)
SCHEDULER = Kind(
    f"scheduler, microseconds per step{MEASURED}",
    (
        *(Column("policy", "policy"), CASE),
        Column(" median us", "median_us", number(".0f")),
        Column(" p20..p80", spread(number(".0f"))),
        Column(" p99", "p99_us", number(".0f")),
        Column(" mean", "mean_us", number(".0f")),
        Column(" mean per rollout", "per_rollout_us", number(".3f")),
        Column(" preemptions per step", "preemptions_per_step", number(".2f")),
        FAILURE,
    ),
)
NEEDLE_DEPTHS = tuple(range(5, 100, 10))  # percent of a haystack's tokens before each needle
NEEDLE = Kind(
    f"needles found in haystacks, by depth{MEASURED}",
    (
        *(CASE, Column("scaling", "impl"), Column(" factor", "factor", number("g")), DTYPE),
        *(Column(f" {depth} %", f"found_{depth}", whole) for depth in NEEDLE_DEPTHS),
        Column(" found", "found", whole),
        Column(" of", "asked", whole),
        Column(" another's", "confused", whole),
        FAILURE,
    ),
)


def _same_tokens(row: Row) -> str | None:
    same, steps = row.get("same_steps"), row.get("steps")
    if not is_number(same):
        return None
    return "all" if same == steps else f"first {same}"


GENERATE = Kind(
    f"continuations of a prompt in transformers{MEASURED}",
    (
        *(CASE, FORM, DTYPE),
        Column(" ms/step", "median_us", number(",.1f", per=1e3)),
        Column(" p20..p80", spread(number(",.1f", per=1e3))),
        ROOFLINE,
        Column(" tokens/s", "tokens_per_second", number(",.1f")),
        Column(" TTFT ms", "ttft_us", number(",.0f", per=1e3)),
        Column(" KV MB", "kv_bytes", megabytes),
        Column(" peak besides weights MB", "peak_bytes", megabytes),
        ERROR,
        Column(" same steps", _same_tokens),
        FAILURE,
    ),
)
FOLD = Kind(
    f"the projector's last two layers, unfolded and folded{MEASURED}",
    (
        *(CASE, DTYPE),
        Column(" max error", "unfolded_max_err", number(".2e")),
        Column(" folded", "folded_max_err", number(".2e")),
        Column(" RMS error", "unfolded_rms_err", number(".2e")),
        Column(" folded", "folded_rms_err", number(".2e")),
        Column(" G products", "unfolded_products", number(".1f", per=1e9)),
        Column(" folded", "folded_products", number(".1f", per=1e9)),
        Column(" MB of weights", "unfolded_bytes", number(".0f", per=1e6)),
        Column(" folded", "folded_bytes", number(".0f", per=1e6)),
        Column(" folded, all in fp64", "fp64_max_err", number(".0e")),
        FAILURE,
    ),
)
FP8_KV = Kind(
    "FP8 KV pages",
    (
        Column("model", "case"),
        *(
            Column(f" {name}", name, number(".4g"))
            for name in ("tokens", "rms_err", "same_top1", "kl_mean", "kl_p99", "loss", "loss_fp8")
        ),
        FAILURE,
    ),
)
PREFILL_MEMORY = Kind(
    "memory of a prompt, read by the engine",
    (
        *(CASE, DTYPE),
        Column(" weights MB", "weight_bytes", megabytes),
        Column(" KV MB", "kv_bytes", megabytes),
        Column(" peak besides MB", "peak_bytes", megabytes),
        Column(" bound MB", "bound_bytes", megabytes),
        Column(" seconds", "seconds", number(",.1f")),
        FAILURE,
    ),
)
DISPATCH = Kind(
    f"calls through PyTorch's dispatcher, microseconds of the host{MEASURED}",
    (
        *(Column("op", "case"), Column("call", "impl"), DTYPE),
        Column(" median us", "median_us", number(".1f")),
        Column(" p20..p80", spread(number(".1f"))),
        Column(" over direct", "over_direct_us", number(".1f")),
        FAILURE,
    ),
)
# The kinds of whole runs by `op`, in the order of a report.
RUNS = {
    "pacore": WHOLE_RUNS,
    "photo": WHOLE_RUNS,
    "vision": IMAGES,
    "vision_load": VISION_LOAD,
    "host_images": HOST_IMAGES,
    "engine_step": ENGINE_STEPS,
    "packing": PACKING,
    "replay": REPLAY,
    "scheduler_step": SCHEDULER,
    "needle": NEEDLE,
    "generate": GENERATE,
    "fold": FOLD,
    "fp8_kv": FP8_KV,
    "prefill_memory": PREFILL_MEMORY,
    "dispatch": DISPATCH,
    **REPLICAS,
    **SERVE,
}
