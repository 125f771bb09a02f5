"""The tables of loads on a server (bench/serve/)."""

from bench.rows.columns import Column, Kind
from bench.rows.formats import CASE, FAILURE, FORM, MEASURED, number, percent, whole

PERCENTILES = (10, 25, 50, 75, 90, 95, 99, 99.9)  # that a run may ask for

LOAD = Kind(
    f"load on a server{MEASURED}",
    (
        CASE,
        Column(" requests", "requests"),
        Column(" failed", "failed"),
        Column(" seconds", "seconds", number(".1f")),
        Column(" at once", "concurrency", number(".1f")),
        Column(" most", "concurrency_max"),
        Column(" requests/s", "requests_per_second", number(".2f")),
        Column(" output tokens/s", "tokens_per_second", number(",.1f")),
        Column(" tokens/s", "total_tokens_per_second", number(",.1f")),
        Column(" prompt tokens", "prompt_tokens", whole),
        Column(" cached", "cached_tokens", whole),
        Column(" output tokens", "output_tokens", whole),
        Column(" per chunk", "tokens_per_chunk", number(".2f")),
        Column(" good/s", "goodput_per_second", number(".2f"), optional=True),
        Column(" good", "good_share", percent(".1f"), optional=True),
        Column(" sent late p99 ms", "late_p99_ms", number(".1f"), optional=True),
        Column(" client CPU", "client_cpu", percent(".0f")),
        FAILURE,
    ),
)
LATENCY = Kind(
    f"latencies in ms{MEASURED}",
    (
        *(CASE, Column("latency", "impl")),
        Column(" count", "count"),
        Column(" mean", "mean_ms", number(",.1f")),
        Column(" median", "median_ms", number(",.1f")),
        *(Column(f" p{p:g}", f"p{p:g}_ms", number(",.1f"), optional=True) for p in PERCENTILES),
        FAILURE,
    ),
)
SOAK = Kind(
    f"soak: {{case}}{MEASURED}",
    (
        *(Column("what", "impl"), Column("target", "target"), Column("measured", "measured")),
        FAILURE,
    ),
)
OVERHEAD = Kind(
    f"through HTTP against the engine alone: {{case}}{MEASURED}",
    (
        FORM,
        Column(" output tokens/s", "tokens_per_second", number(",.1f")),
        Column(" min", "tokens_per_second_min", number(",.1f")),
        Column(" max", "tokens_per_second_max", number(",.1f")),
        Column(" of the engine's", "share", percent(".1f"), optional=True),
        Column(" min", "share_min", percent(".1f"), optional=True),
        Column(" max", "share_max", percent(".1f"), optional=True),
        Column(" target", "target", percent(".0f"), optional=True),
        Column(" repeats", "repeats"),
        FAILURE,
    ),
)
SERVE = {
    "serve": LOAD,
    "serve_latency": LATENCY,
    "serve_soak": SOAK,
    "serve_overhead": OVERHEAD,
}
