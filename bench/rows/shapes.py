"""The shape of a row: its case's sizes by name.

Rows have it in `shape`. Decode steps and attention that were recorded before rows had it are read
from their case's name, such as "smollm2 B16 P1500 S64" or "B32 P4096 S512 fp8 window 512".
"""

import re
from collections.abc import Mapping
from functools import cache

NAME = re.compile(
    r"(?:pacore \w+ |(?P<model>\S+) )?B(?P<batch>\d+) P(?P<prefix>\d+) S(?P<suffix>\d+)"
    r"(?P<fp8> fp8)?(?: window (?P<window>\d+))?"
    r"(?: (?P<heads>\d+)/(?P<kv_heads>\d+) heads of (?P<head_dim>\d+))?"
)
HEADS = ("heads", "kv_heads", "head_dim")
OF_MODEL = {None: (32, 8, 128), "smollm2": (9, 3, 64)}  # of attention's cases


def shape_of(row: Mapping) -> dict:
    """The row's shape; empty if neither it nor its name has one."""
    shape = row.get("shape")
    return dict(shape) if isinstance(shape, Mapping) else dict(_named(str(row.get("case") or "")))


@cache
def _named(case: str) -> dict[str, object]:
    match = NAME.fullmatch(case)
    if not match:
        return {}
    model, fp8 = match["model"], match["fp8"]
    sizes = ("batch", "prefix", "suffix", "window", *HEADS)
    shape: dict[str, object] = {name: int(match[name]) for name in sizes if match[name]}
    if model in OF_MODEL:
        shape = dict(zip(HEADS, OF_MODEL[model], strict=True)) | shape
    else:
        shape["model"] = model
    return shape | ({"fp8": True} if fp8 else {})
