"""`python -m model describe MODEL`: the size of a model, without allocating it."""

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch

from model.config import PRESETS, Config, unknown_model
from model.impls import DTYPES
from model.step3vl import Step3VL
from model.terminal import add_rope_scaling
from model.weights.gguf import read_gguf
from model.weights.hf_config import read_config


def describe(config: Config, dtype: torch.dtype) -> dict:
    """Size of a model whose weights and KV cache have type `dtype`.

    `parameters` counts tied embeddings once; `tensors` counts the checkpoint's names; `parts`
    divides the parameters by part; `context` is in tokens; `table` has name, shape and bytes of
    every tensor.
    """
    tensors = Step3VL(config, device="meta", dtype=dtype).checkpoint_tensors()
    scaling = config.decoder.rope_scaling
    parts = {"vision tower": 0, "downsamplers": 0, "projector": 0, "decoder": 0}
    for name, tensor in tensors.items():
        parts[_part(name)] += tensor.numel()
    parameters = sum(parts.values())
    return {
        "name": config.name,
        "parameters": parameters,
        "tensors": len(tensors),
        "weight_bytes": parameters * dtype.itemsize,
        "kv_bytes_per_token": config.decoder.kv_bytes_per_token(dtype.itemsize),
        "context": config.decoder.max_positions,
        "rope_scaling": scaling and asdict(scaling),
        "parts": {part: count for part, count in parts.items() if count},
        "table": [
            {"name": name, "shape": list(t.shape), "bytes": t.numel() * dtype.itemsize}
            for name, t in tensors.items()
        ],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help=f"{', '.join(PRESETS)}, a checkpoint directory or a GGUF file"
    )
    add_rope_scaling(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="weights and KV (default: bfloat16)"
    )


def run(options: argparse.Namespace) -> int:
    """The `describe` command. Raises InputError for a model that does not exist."""
    config = _config(options.model)
    if options.rope_scaling is not None:
        config = config.with_rope_scaling(options.rope_scaling)
    size = describe(config, DTYPES[options.dtype])
    if not options.tensors:
        del size["table"]
    if options.json:
        print(json.dumps(size))
    else:
        _print(size, options.dtype)
    return 0


def _config(model: str) -> Config:
    path = Path(model)
    if model in PRESETS:
        return PRESETS[model]
    if os.path.isdir(path):  # unlike Path's, also false for names too long for the system
        return read_config(path)
    if os.path.isfile(path):
        return read_gguf(path)[0]
    raise unknown_model(model)


def _part(name: str) -> str:
    if name.startswith("vision_model.vit_downsampler"):
        return "downsamplers"
    if name.startswith("vision_model."):
        return "vision tower"
    return "projector" if name.startswith("vit_large_projector.") else "decoder"


def _print(size: dict, dtype: str) -> None:
    count, kv = size["weight_bytes"], size["kv_bytes_per_token"] * size["context"]
    weights = f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
    rows = [
        ("parameters", f"{size['parameters']:,}"),
        *((f"  {part}", f"{count:,}") for part, count in size["parts"].items()),
        ("checkpoint tensors", f"{size['tensors']:,}"),
        (f"weights in {dtype}", weights),
        (f"KV cache per token in {dtype}", f"{size['kv_bytes_per_token']:,} B"),
        ("context", f"{size['context']:,} tokens"),
        (f"  KV cache of one context in {dtype}", f"{kv / 1e9:.2f} GB"),
    ]
    if scaling := size["rope_scaling"]:
        rows.append(("  rope scaling", f"{scaling['rope_type']} x {scaling['factor']:g}"))
    _print_table(size["name"], rows)
    if "table" in size:
        _print_table(
            "tensors", [(r["name"], "x".join(map(str, r["shape"]))) for r in size["table"]]
        )


def _print_table(title: str, rows: list[tuple[str, str]]) -> None:
    """Print two aligned columns under a title."""
    left, right = (max(map(len, column)) for column in zip(*rows, strict=True))
    text = "\n".join(f"  {name:{left}}  {value:>{right}}" for name, value in rows)
    print(f"{title}\n{text}")
