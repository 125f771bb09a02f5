"""The tables of `bench cost`: floors and balance by arithmetic."""

from bench.rows.columns import Column, Kind
from bench.rows.formats import (
    CASE,
    IMPL,
    OP,
    megabytes,
    number,
    whole,
)

ATTENTION = Kind(
    "cost of prefix attention by arithmetic: {table} ({gpu})",
    (
        *(CASE, Column("mode", "mode")),
        Column(" KV MB", "kv_bytes", megabytes),
        Column(" unshared MB", "kv_unshared_bytes", megabytes),
        Column(" loaded MB", "kv_loaded_bytes", megabytes),
        Column(" partials MB", "partial_bytes", megabytes),
        Column(" workspace MB", "workspace_bytes", megabytes),
        Column(" q, out MB", "io_bytes", megabytes),
        Column(" GFLOP", "flops", number(",.2f", per=1e9)),
        Column(" items", "items"),
        Column(" programs", "programs"),
        Column(" balance", "balance_places", number(".3f")),
        Column(" balance in bytes", "balance_bytes", number(".3f")),
        Column(" floor us", "floor_us", number(",.1f")),
        Column(" unshared us", "floor_unshared_us", number(",.1f")),
        Column(" saves", "saves", number(".2f")),
    ),
)
ROTARY = Kind(
    "cost that rotary adds to attention, by arithmetic: two ops or fused ({gpu})",
    (
        CASE,
        Column(" rotations, two ops", "separate_vectors", whole),
        Column(" fused", "fused_vectors", whole),
        Column(" Q MB, two ops", "separate_bytes", megabytes),
        Column(" fused", "fused_bytes", megabytes),
        Column(" us, two ops", "separate_us", number(",.2f")),
        Column(" fused", "fused_us", number(",.2f")),
    ),
)
VISION = Kind(
    "vision ops by arithmetic ({gpu}, data sheet)",
    (
        *(OP, CASE, IMPL),
        Column(" programs", "programs", lambda counts: " + ".join(f"{n:,}" for n in counts)),
        Column(" balance", "balance", number(".3f")),
        Column(" padding", "padding", number(".3f")),
        Column(" scheduled us", "scheduled_us", number(",.1f")),
        Column(" floor us", "floor_us", number(",.1f")),
    ),
)
