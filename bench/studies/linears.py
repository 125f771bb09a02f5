"""The linear layers of one decode step: how close the library's GEMMs come to the copy bandwidth.

With few rows, a product is mostly reading its weights. Several sets of weights alternate, so that
none is found in the cache, as in a step, where hundreds of megabytes pass between two uses.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from bench.measure.rows import measured
from bench.measure.timing import measure, sets_for
from bench.measure.verdicts import NOT_RUN
from model.config import DecoderConfig
from model.decoder import Decoder
from model.impls import impl_per_op

ROWS = (16, 32, 64)
NAMES = ("qkv", "o", "gate_up", "down", "lm_head")


def case_name(name: str, rows: int) -> str:
    """Such as "gate_up T16"."""
    return f"{name} T{rows}"


def time_linear(
    config: DecoderConfig,
    name: str,
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    budget_s: float,
) -> dict:
    """The row of one of NAMES for `rows` rows: x [rows, C] times weight [F, C].

    `copy_pct` is its bytes per second as a share of the copy bandwidth, `per_step` the number of
    such products in a decode step.
    """
    out, width = shape_of(config, name, dtype)
    num_bytes = dtype.itemsize * (rows * width + out * width + rows * out)
    sets = sets_for(num_bytes, device)
    weights = [torch.randn(out, width, device=device, dtype=dtype) for _ in range(sets)]
    inputs = [torch.randn(rows, width, device=device, dtype=dtype) for _ in range(sets)]
    timing = measure(
        {"torch": lambda index: F.linear(inputs[index], weights[index])},
        device=device,
        sets=sets,
        budget_s=budget_s,
    )["torch"]
    row = measured(
        "linear",
        case_name(name, rows),
        "torch",
        device=device,
        dtype=dtype,
        num_bytes=num_bytes,
        flops=2 * rows * width * out,
        verdict=NOT_RUN,  # it is the reference
        timing=timing,
    )
    row |= {"rows": rows, "per_step": 1 if name == "lm_head" else config.layers}
    if row["median_us"]:
        row["copy_pct"] = 100 * num_bytes / row["median_us"] / 1e3 / row["copy_gb_s"]
    return row


def shape_of(config: DecoderConfig, name: str, dtype: torch.dtype) -> tuple[int, int]:
    """The shape [F, C] of a decoder's weight."""
    one_layer = replace(config, layers=1)
    decoder = Decoder(one_layer, impl=impl_per_op(None), device="meta", dtype=dtype)
    linear = decoder.lm_head if name == "lm_head" else getattr(decoder.layers[0], name)
    return tuple(linear.weight.shape)
