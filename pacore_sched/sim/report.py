"""Tables of simulated runs: every policy's medians, and its gain over the baselines."""

from collections.abc import Iterable, Sequence
from math import exp, log
from statistics import median

from model.terminal import table

Variant = tuple[bool, str]  # shared reads, dtype of KV
Column = tuple[str, str, float, str]  # title, field, factor, format of a number
BASELINES = ("fcfs", "one-at-a-time")
ORACLE = "oracle"
KEYS = ("workload", "sigma_w", "policy", "gpus", "shared_reads", "kv_dtype")
OPTIONAL_KEYS = ("migrate", "vision_budget", "concurrency")  # that only some rows have
REQUESTS: tuple[Column, ...] = (
    ("requests/s", "requests_per_s", 1, ".2f"),
    ("TTFT ms", "request_ttft_mean_s", 1e3, ",.0f"),
    ("p50", "request_ttft_p50_s", 1e3, ",.0f"),
    ("p99", "request_ttft_p99_s", 1e3, ",.0f"),
    ("TPOT ms", "tpot_mean_s", 1e3, ".1f"),
    ("ITL p99 ms", "itl_p99_s", 1e3, ".1f"),
    ("without the tower", "itl_alone_p99_s", 1e3, ".1f"),
)
GPU_TIME: tuple[Column, ...] = (
    ("vision tower", "gpu_tower", 100, ".0f"),
    ("prefill", "gpu_prefill", 100, ".0f"),
    ("decode", "gpu_decode", 100, ".0f"),
    ("idle", "gpu_idle", 100, ".0f"),
)


def print_report(rows: Sequence[dict], variant: Variant) -> None:
    """Print a table per workload and sigma_w for one variant, then comparisons.

    The comparisons are of all variants, and of the policies with the baselines.
    """
    shown = [row for row in rows if variant_of(row) == variant]
    for workload, sigma_w in _unique((row["workload"], row["sigma_w"]) for row in shown):
        of_workload = [
            row for row in shown if (row["workload"], row["sigma_w"]) == (workload, sigma_w)
        ]
        _policies(workload, sigma_w, of_workload)
        if "requests_per_s" in of_workload[0]:
            _medians_table(f"{workload}: requests, medians", of_workload, REQUESTS)
        if "gpu_tower" in of_workload[0]:
            budget = of_workload[0]["vision_budget"]
            title = f"{workload}: the GPUs' time in percent, vision budget {budget!r}, medians"
            _medians_table(title, of_workload, GPU_TIME)
    others = [other for other in _unique(map(variant_of, rows)) if other != variant]
    if others:
        _variants(rows, [variant, *others])
    if len(_unique(row["policy"] for row in shown)) > 1:
        _gains(shown)


def variant_of(row: dict) -> Variant:
    return row["shared_reads"], row["kv_dtype"]


def gains(rows: Sequence[dict], base: str, field: str) -> dict[str, list[float]]:
    """Per policy, `base`'s value of `field` divided by the policy's, for each pair of runs of the
    same problems."""
    key = ("workload", "sigma_w", "seed", "shared_reads", "kv_dtype")
    base_rows = {tuple(row[name] for name in key): row for row in rows if row["policy"] == base}
    ratios: dict[str, list[float]] = {}
    for row in rows:
        base_row = base_rows.get(tuple(row[name] for name in key))
        if base_row:
            ratios.setdefault(row["policy"], []).append(base_row[field] / row[field])
    return ratios


def medians(rows: Sequence[dict]) -> list[dict]:
    """A row per workload, sigma_w, policy and variant: medians over seeds, and their number."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        key = tuple((name, row[name]) for name in (*KEYS, *OPTIONAL_KEYS) if name in row)
        groups.setdefault(key, []).append(row)
    median_rows = []
    for key, runs in groups.items():
        fields = [name for name in runs[0] if name not in (*dict(key), "seed")]
        values = {name: _median([run[name] for run in runs]) for name in fields}
        median_rows.append(dict(key) | {"seeds": len(runs)} | values)
    return median_rows


def geometric_mean(values: Sequence[float]) -> float:
    return exp(sum(map(log, values)) / len(values))


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return None if len(known) < len(values) else float(f"{median(known):.5g}")


def _policies(workload: str, sigma_w: float | None, rows: Sequence[dict]) -> None:
    header = ["policy", " makespan min", " time to answer min", " p50", " p95", " p99"]
    header += [" used tok/s", " occupancy", " KV", " MBU", " tail", " preempted", " recomputed"]
    goodput = rows[0]["goodput_per_h"] is not None
    if goodput:
        header.append(" goodput/h")
    several = "critical_path_s" in rows[0]
    if several:
        header += [" moved", " critical path min"]
    lines = []
    for policy in _unique(row["policy"] for row in rows):
        of_policy = [row for row in rows if row["policy"] == policy]
        medians_by_name = {
            name: median(row[name] for row in of_policy)
            for name in rows[0]
            if all(isinstance(row[name], int | float) for row in of_policy)
        }
        lines.append(
            [
                policy,
                _spread([row["makespan_s"] / 60 for row in of_policy]),
                _spread([row["tta_mean_s"] / 60 for row in of_policy]),
                *(f"{medians_by_name[f'tta_p{p}_s'] / 60:.1f}" for p in (50, 95, 99)),
                f"{medians_by_name['used_tok_s']:,.0f}",
                *(
                    _percent(medians_by_name.get(name))
                    for name in ("slot_occupancy", "kv_utilisation")
                ),
                *(_percent(medians_by_name.get(name)) for name in ("mbu", "tail_share")),
                f"{medians_by_name['preemptions']:,.0f}",
                f"{medians_by_name['recomputed_tokens'] / 1e3:,.0f}k",
                *([f"{medians_by_name['goodput_per_h']:.1f}"] if goodput else []),
                *([f"{medians_by_name['moved_rollouts']:,.0f}"] if several else []),
                *([f"{medians_by_name['critical_path_s'] / 60:.1f}"] if several else []),
            ]
        )
    spread = "" if sigma_w is None else f", sigma_w {sigma_w:g}"
    runs = len(_unique(row["seed"] for row in rows))
    gpus = rows[0]["gpus"]
    title = f"{workload}{spread}: medians of {runs} seeds (min..max), {gpus} GPU{'s' * (gpus > 1)}"
    table(title, header, lines)


def _medians_table(title: str, rows: Sequence[dict], columns: Sequence[Column]) -> None:
    """Print a policy's medians per line, without columns that the rows do not have."""
    lines, columns = [], [column for column in columns if column[1] in rows[0]]
    for policy in _unique(row["policy"] for row in rows):
        line = [policy]
        for _, field, factor, form in columns:
            known = [row[field] for row in rows if row["policy"] == policy]
            value = None if None in known else median(known)
            line.append("" if value is None else f"{factor * value:{form}}")
        lines.append(line)
    table(title, ["policy", *(f" {name}" for name, *_ in columns)], lines)


def _variants(rows: Sequence[dict], variants: Sequence[Variant]) -> None:
    """Print medians of makespan and mean time to answer in minutes, a column per variant."""
    lines = []
    for workload, policy in _unique((row["workload"], row["policy"]) for row in rows):
        cells = []
        for variant in variants:
            runs = [
                row
                for row in rows
                if (row["workload"], row["policy"]) == (workload, policy)
                and variant_of(row) == variant
            ]
            pair = (median(run[name] / 60 for run in runs) for name in ("makespan_s", "tta_mean_s"))
            cells.append(" / ".join(f"{value:.1f}" for value in pair))
        lines.append([workload, policy, *cells])
    names = [f" {'shared' if shared else 'unshared'} reads, {kv}" for shared, kv in variants]
    title = "makespan / mean time to answer in minutes, medians"
    table(title, ("workload", "policy", *names), lines)


def _gains(rows: Sequence[dict]) -> None:
    """Print how much better each policy is than the baselines, over runs of the same problems."""
    policies = _unique(row["policy"] for row in rows)
    header, columns = ["policy"], []
    for base in (*BASELINES, ORACLE):
        if base in policies:
            for field, name in (("tta_mean_s", "answers"), ("makespan_s", "makespan")):
                header.append(f" {name} vs {base}")
                columns.append(gains(rows, base, field))
    if not columns:
        return
    lines = [[policy, *(_ratio(column.get(policy)) for column in columns)] for policy in policies]
    count = len(_unique((row["workload"], row["sigma_w"], row["seed"]) for row in rows))
    title = "times faster than baselines and oracle in mean time to answer and in makespan:"
    table(f"{title} geometric mean of {count} runs (min..max)", header, lines)


def _ratio(values: Sequence[float] | None) -> str:
    if not values:
        return ""
    return f"{geometric_mean(values):.2f} ({min(values):.2f}..{max(values):.2f})"


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.1f} ({min(values):.1f}..{max(values):.1f})"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _unique(values: Iterable) -> list:
    return list(dict.fromkeys(values))
