"""Invented rows for tests of the report, in the form that `python -m bench` writes."""

BASE = {
    "dtype": "bfloat16",
    "max_err": 1.5e-3,
    "rms_err": 2e-4,
    "speedup": None,
    "failure": None,
    "skipped": None,
    "version": None,
    "timer": "graph",
    "repeats": 9,
    "copy_gb_s": 4000.0,
    "gemm_tflop_s": 700.0,
    "device": "NVIDIA H200",
    "commit": "0123456789ab",
    "torch": "2.13.0",
    "triton": "3.6.0",
    "driver": "570.1",
    "time": "2026-11-27T10:00:00Z",
    "schema": 1,
}


def row(op, case, impl, us, num_bytes=4e6, flops=7e8, **more):
    """A row of the op table; `us` is None if there is no time."""
    times = {
        name: us and us * f for name, f in (("p20_us", 0.9), ("median_us", 1), ("p80_us", 1.2))
    }
    floor = max(num_bytes / 4e6, flops / 7e8)
    result = {**BASE, "op": op, "case": case, "impl": impl, **times}
    result |= {"bytes": int(num_bytes), "flops": int(flops)}
    return result | {"roofline_pct": us and 100 * floor / us} | more


def part(case, impl, name, us, **more):
    """A row of one part of a decode step."""
    result = row("decode_part", case, impl, us) | {"part": name} | more
    omitted = ("p20_us", "p80_us", "bytes", "flops")
    return {key: result[key] for key in result if key not in omitted}


def heat(name, eager, ours, peer=None):
    """The rows of one point of the heat map."""
    times = {"eager": eager, "triton": ours, "portable": 2 * ours, "sdpa": peer and 3 * peer}
    times["fa3"] = peer
    return [row("prefix_attention", name, impl, us) for impl, us in times.items() if us]


def every_kind():
    """Rows for every section of a report, from two devices."""
    cpu = {"device": "AMD EPYC, 2 threads", "driver": None, "dtype": "float32"}
    timeline = {"seconds": [0.0, 1.0, 2.5], "running": [1, 16, 3], "kv_tokens": [100, 900, 400]}
    names = {"op": "packing", "case": "tiny 8 x [8]", "makespan_s": 12.25, "tta_mean_s": 7.5}
    return [
        *heat("B16 P512 S128", 812.5, 101.25, 250.0),
        *heat("B16 P2048 S128", 3000.0, 60.0, 240.0),
        row("prefix_attention", "B16 P512 S128", "flashinfer", None, skipped="not installed"),
        row("rms_norm", "T7 C4096", "eager", None),
        row("rms_norm", "T7 C4096", "triton", None, failure="max error 0.5 > 0.01", max_err=0.5),
        row("rms_norm", "T16 C4096", "eager", 12.5),
        row("rms_norm", "T16 C4096", "triton", 3.25, time="2026-11-26T10:00:00Z", commit="a" * 12),
        row("rms_norm", "T16 C4096", "triton", 2.5),
        row("decode_step", "tiny B4 P256 S64", "default", 40.0, flops=7e9),
        part("tiny B4 P256 S64", "default", "linear", 30.0),
        part("tiny B4 P256 S64", "default", "rotary_attention", 12.0),
        part("tiny B4 P256 S64", "eager", "linear", 31.0),
        row("pacore", "tiny P9 W4", "default", 2.5e6, tokens_per_second=321.5, timeline=timeline),
        BASE | names | {"impl": "fcfs"},
        {"op": "mystery", "depth": 3},
        row("rms_norm", "T16 C4096", "eager", 77.5, **cpu),
        row("rms_norm", "T16 C4096", "portable", 31.0, **cpu),
    ]
