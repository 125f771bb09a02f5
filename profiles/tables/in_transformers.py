"""The tables of ops in other people's models: `bench generate` and `bench dispatch`."""

from collections.abc import Sequence

from bench.rows.columns import Column, Table, make_table, markdown
from bench.rows.formats import number, whole
from profiles.tables.figures import Row, latest_row, spread

GENERATE_CASES = {  # tokens of the prompt: the case
    "512": "smollm2-135m P512 W16 T32",
    "2,048": "smollm2-135m P2048 W16 T32",
}
GENERATE_FORMS = {
    "stock": "transformers",
    "ours": "shared pages",
    "ours, patched": "shared pages, patched",
}
GENERATE_COLUMNS = (
    Column("prompt, `generate`", "label"),
    Column(" ms per step", lambda row: spread(dict(row))),
    Column(" tokens/s, prompt included", "tokens_per_second", number(",.1f")),
    Column(" first tokens after, s", "ttft_us", number(",.2f", per=1e6)),
    Column(" KV, MB", "kv_bytes", number(",.0f", per=1e6)),
    Column(" peak besides weights, MB", "peak_bytes", number(",.0f", per=1e6)),
    Column(" steps with stock's tokens", "same_steps", whole),
)


def generations(measured: Sequence[Row]) -> str:
    """Sixteen continuations of a prompt in transformers, by its `generate` and by ours; no line
    where none was measured."""
    rows = [row for row in measured if row["op"] == "generate" and not row.get("failure")]
    lines = [
        {"label": f"{tokens}, {label}", **latest_row(rows, case=case, impl=impl)}
        for tokens, case in GENERATE_CASES.items()
        for label, impl in GENERATE_FORMS.items()
        if any((row["case"], row["impl"]) == (case, impl) for row in rows)
    ]
    return markdown(make_table("", GENERATE_COLUMNS, lines))


DISPATCH_FORMS = ("direct", "operator", "custom_op")


def dispatch(measured: Sequence[Row]) -> str:
    """The host's microseconds per call: an op's function, and through PyTorch's dispatcher."""
    rows = [row for row in measured if row["op"] == "dispatch"]
    times = {(row["case"], row["impl"]): number(".0f")(row["median_us"]) for row in rows}
    header = ("op, one token", *(f" {form}, us" for form in DISPATCH_FORMS))
    lines = [
        [f"`{op}`", *(times.get((op, form), "") for form in DISPATCH_FORMS)]
        for op in dict.fromkeys(row["case"] for row in rows)
    ]
    return markdown(Table("", header, lines))
