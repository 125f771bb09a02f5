"""`python -m bench serve [STUDY]`: load on an HTTP server with OpenAI's interface.

`load`, the default: latencies and throughput of a workload, on the server at --base-url, or on ours
with --model, which is started for it.
`soak`: a thousand requests on our server, some of which misbehave; nothing may leak or get lost.
`engine`: throughput through HTTP against that of the engine alone.
Options that `vllm bench serve` or `sglang.bench_serving` have too mean the same.
"""

import argparse
import asyncio
import resource
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import torch

from bench.cli.measurement import Measurement
from bench.rows import show
from bench.serve import engine_share, load_study, soak
from bench.serve.connection.own_server import own_server
from bench.serve.options import DATASETS, STUDIES, chosen, default_text
from bench.serve.workloads.images import resolution
from bench.serve.workloads.requests import PATHS
from model.errors import InputError
from model.terminal import integer, real
from pacore_sched.answers.rounds import MAX_WIDTH

COUNT, TOKENS = integer(1, 10**6), integer(1, 10**6)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `serve`; None is the default of the study or the dataset."""
    parser.add_argument("study", nargs="?", choices=STUDIES, default="load", help="default: load")
    add = parser.add_argument
    add("--base-url", metavar="URL", help="the server, with or without /v1")
    add("--model", help="a name at --base-url (default: its first), or the model of our server")
    add("--server-options", metavar="TEXT", help="of our server, such as '--max-running 16'")
    add("--api-key", help="default: the variable OPENAI_API_KEY, which other users cannot read")
    add("--backend", choices=PATHS, help="openai-chat (default), or openai for /v1/completions")
    add("--num-prompts", type=COUNT, metavar="N", help=default_text("num_prompts"))
    add("--max-concurrency", type=COUNT, metavar="N", help="requests that run at a time")
    add("--seed", type=integer(0, 2**31 - 1), help="equal seeds, equal requests (default: 0)")
    add("--repeats", type=integer(1, 1000), metavar="N", help=default_text("repeats"))
    _add_datasets(parser)
    _add_load(parser)


def _add_datasets(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("workloads").add_argument
    add("--dataset-name", "--dataset", choices=DATASETS, help="default: random")
    add("--dataset-path", type=Path, metavar="TRACE", help="file of Mooncake or Azure, for trace")
    add("--random-input-len", type=TOKENS, metavar="N", help=default_text("random_input_len"))
    add("--random-output-len", type=TOKENS, metavar="N", help=default_text("random_output_len"))
    add(
        "--random-range-ratio",
        type=real(0, 1),
        metavar="R",
        help="lengths are uniform in [1 - R, 1 + R] times these (default: 0)",
    )
    add("--image-count", type=integer(1, 1000), metavar="N", help="per request (default: 1)")
    add(
        "--image-resolution",
        type=resolution,
        metavar="R",
        help="360p, 720p, 1080p, 4k or WIDTHxHEIGHT (default: 1080p)",
    )
    add(
        "--pacore-widths",
        nargs="*",
        type=integer(1, MAX_WIDTH),
        metavar="N",
        help="rollouts of each round (default: 16)",
    )
    for name, text in (
        ("prefix-len", "tokens that requests of one prefix share"),
        ("suffix-len", "tokens of a request after its prefix"),
        ("num-prefixes", "number of prefixes"),
        ("output-len", "tokens of an answer"),
    ):
        default = DATASETS["prefix_repetition"][f"prefix_repetition_{name.replace('-', '_')}"]
        add(
            f"--prefix-repetition-{name}",
            type=TOKENS,
            metavar="N",
            help=f"{text} (default: {default})",
        )


def _add_load(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("load").add_argument
    add("--request-rate", metavar="R", help="requests per second (default: inf, all at once)")
    add(
        "--burstiness",
        type=real(1e-3, 1e3),
        metavar="B",
        help="shape of the gamma distribution of gaps; 1: Poisson (default), less: in bursts",
    )
    add(
        "--num-warmups",
        "--warmup-requests",
        type=integer(0, 10**4),
        metavar="N",
        help="other requests of the workload that come first and do not count (default: 1)",
    )
    add("--ignore-eos", action="store_true", default=None, help="answers have full length: default")
    add("--disable-ignore-eos", dest="ignore_eos", action="store_false", help="they may end")
    add("--disable-stream", action="store_true", default=None, help="only E2EL can be measured")
    add(
        "--goodput",
        nargs="+",
        metavar="NAME:MS",
        help="also the rate of requests within these limits, such as ttft:500 tpot:50 e2el:9000",
    )
    add("--metric-percentiles", metavar="P,P", help="of latencies (default: 90,99)")
    add("--extra-request-body", metavar="JSON", help="fields of every body, as an object")


def rows(options: argparse.Namespace, device: torch.device) -> Iterator[dict]:
    """The rows of the study. Raises InputError for options that are not its own."""
    known = chosen(options)
    _allow_connections()
    server_words: list[str] = []
    if options.device:
        server_words += ["--device", options.device]
    if options.threads:
        server_words += ["--threads", str(options.threads)]
    if options.study == "engine":
        yield from engine_share.run(known, device, server_words)
        return
    with ExitStack() as stack:
        if options.study == "load" and known.base_url:
            if options.threads or known.server_options:
                raise InputError(
                    "--threads and --server-options are of our server, which does not run with"
                    " --base-url"
                )
            server = None
        else:
            if known.model is None:
                raise InputError("give --base-url URL, or --model NAME to start our server")
            extra = soak.SERVER if options.study == "soak" else ()
            server = stack.enter_context(
                own_server(known.model, [*extra, *server_words, *known.server_options])
            )
        if options.study == "soak":
            assert server is not None
            yield from asyncio.run(soak.run(server, known, device))
        else:
            yield from asyncio.run(load_study.run(server, known, device))


def _allow_connections() -> None:
    """Allow as many open files as the system lets this process have: one per connection, in the
    client and in our server."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


SERVE = Measurement(rows, show.serve, arguments)
