"""The options of each study and dataset with their defaults, and those that need more than argparse
to be understood."""

import argparse
import json
import math
import shlex
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from bench.rows.serve_tables import PERCENTILES
from bench.serve.metrics import SLO
from bench.serve.workloads.requests import one_text
from model.errors import InputError, shown

RANDOM = {"random_input_len": 1024, "random_output_len": 128, "random_range_ratio": 0.0}
DATASETS: dict[str, dict[str, Any]] = {
    "random": RANDOM,
    "image": {**RANDOM, "image_count": 1, "image_resolution": (1920, 1080)},
    "pacore": {**RANDOM, "pacore_widths": [16]},
    "prefix_repetition": {
        "prefix_repetition_prefix_len": 256,
        "prefix_repetition_suffix_len": 256,
        "prefix_repetition_num_prefixes": 10,
        "prefix_repetition_output_len": 128,
    },
    "trace": {"dataset_path": None},
}
LOAD: dict[str, Any] = {
    "base_url": None,
    "model": None,
    "server_options": "",
    "api_key": None,
    "backend": "openai-chat",
    "dataset_name": "random",
    "num_prompts": 1000,
    "request_rate": None,
    "burstiness": 1.0,
    "max_concurrency": None,
    "seed": 0,
    "num_warmups": 1,
    "ignore_eos": True,
    "disable_stream": False,
    "goodput": (),
    "metric_percentiles": "90,99",
    "extra_request_body": "{}",
}
STUDIES: dict[str, dict[str, Any]] = {
    "load": LOAD,
    "soak": {
        "model": "tiny",
        "server_options": "",
        "num_prompts": 1000,
        "max_concurrency": 32,
        "seed": 0,
    },
    "engine": {
        "model": "smollm2-135m",
        "server_options": "",
        "num_prompts": 16,
        "random_input_len": 128,
        "random_output_len": 128,
        "seed": 0,
        "repeats": 5,
    },
}


def chosen(options: argparse.Namespace) -> SimpleNamespace:
    """The study's options and those of its dataset, defaults filled in, and parsed.

    Raises InputError for options of another study or dataset, and for invalid values.
    """
    known = dict(STUDIES[options.study])
    owner = options.study
    if options.study == "load":
        dataset = options.dataset_name or "random"
        known |= DATASETS[dataset]
        owner = f"--dataset-name {dataset}"
    names = {name for table in (*STUDIES.values(), *DATASETS.values()) for name in table}
    for name in sorted(names):
        if getattr(options, name) is not None and name not in known:
            raise InputError(f"--{name.replace('_', '-')} is not an option of {owner}")
    values = {
        name: default if getattr(options, name) is None else getattr(options, name)
        for name, default in known.items()
    }
    given = SimpleNamespace(**values)
    given.server_options = server_words(given.server_options)
    if options.study == "load":
        given.num_prompts_given = options.num_prompts is not None
        given.request_rate = rate(given.request_rate)
        given.goodput = objective(given.goodput)
        given.metric_percentiles = percentiles(given.metric_percentiles)
        given.extra_request_body = extra_body(given.extra_request_body)
        _check_goodput(given)
        if given.dataset_name == "trace" and given.dataset_path is None:
            raise InputError("--dataset-name trace needs --dataset-path FILE")
    return given


def default_text(name: str) -> str:
    tables = {**STUDIES, **DATASETS}
    values: dict[Any, list[str]] = {}
    for owner, table in tables.items():
        if name in table:
            values.setdefault(table[name], []).append(owner)
    if len(values) == 1:
        return f"default: {next(iter(values))}"
    return f"default: {', '.join(f'{v} ({owners[0]})' for v, owners in values.items())}"


def rate(text: str | None) -> float | None:
    """Requests per second; None for "inf", which sends all at once."""
    if text is None or text == "inf":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1e-6 <= value <= 1e6:  # also for NaN
        raise InputError(f"--request-rate {text[:40]}: it must be from 1e-6 to 1e6, or inf")
    return value


def objective(words: Sequence[str]) -> dict[str, float]:
    """Limits in ms, such as {"ttft": 500.0} of "ttft:500"."""
    limits = {}
    for word in words:
        name, _, text = word.partition(":")
        try:
            limit = float(text)
        except ValueError:
            limit = math.nan
        if name not in SLO or not 0 <= limit <= 1e9:
            names = ", ".join(f"{known}:MS" for known in SLO)
            raise InputError(f"--goodput {shown(word)}: it must be of {names}, MS from 0 to 1e9")
        limits[name] = limit
    return limits


def _check_goodput(given: SimpleNamespace) -> None:
    """Raises InputError for limits on latencies that the requests do not have."""
    body = {"stream": not given.disable_stream, "model": given.model} | given.extra_request_body
    if not body["stream"] and (names := [n for n in ("ttft", "tpot") if n in given.goodput]):
        raise InputError(f"--goodput {names[0]}: answers that are not streamed have none")
    if "tpot" in given.goodput and (given.dataset_name == "pacore" or not one_text(body)):
        raise InputError(
            "--goodput tpot: PaCoRe and `n` have none, as their tokens come in several texts"
        )


def server_words(text: str) -> list[str]:
    """The words of --server-options, as a shell splits them."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise InputError(f"--server-options {shown(text)}: {str(error).lower()}") from None


def percentiles(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(word) for word in text.split(","))
    except ValueError:
        values = (math.nan,)
    if not set(values) <= set(PERCENTILES):
        allowed = ",".join(f"{p:g}" for p in PERCENTILES)
        raise InputError(f"--metric-percentiles {shown(text)}: choose from {allowed}")
    return values


def extra_body(text: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise InputError(f"--extra-request-body {shown(text)}: it must be a JSON object")
    return body
