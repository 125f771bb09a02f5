"""`python -m pacore_sched serve`: PaCoRe over HTTP, with OpenAI's interface."""

import argparse
import logging
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import InputError
from model.terminal import integer, real
from pacore_sched.cli import options as shared
from pacore_sched.serve.limits import Limits
from pacore_sched.sim.machine import MACHINES, find_machine

if TYPE_CHECKING:
    import torch

    from pacore_sched.serve.api.context import Context
    from pacore_sched.serve.images import MediaRules

KEY_VARIABLE = "PACORE_API_KEY"
MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model_options(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    parser.add_argument(
        "--port", type=integer(0, 65_535), default=8000, help="0 takes a free one (default: 8000)"
    )
    parser.add_argument(
        "--served-model-name",
        action="append",
        help="name of the model in requests; may be repeated; default: --model",
    )
    parser.add_argument(
        "--api-key",
        action="append",
        help=f"key that requests must have; may be repeated; default: the variable {KEY_VARIABLE},"
        " which other users of the machine cannot read; without any, all requests are taken",
    )
    shared.add_engine_options(parser)
    _add_limits(parser)
    _add_replicas(parser)
    parser.add_argument(
        "--drain-seconds",
        type=real(0, 1e6),
        default=30.0,
        help="after SIGTERM or Ctrl-C, time for requests to end (default: 30)",
    )
    parser.add_argument(
        "--journal",
        help="folder for the finished rollouts of PaCoRe requests that were cut short; the same"
        " request sent again goes on from there; default: they are lost",
    )
    parser.add_argument(
        "--allowed-media-domains",
        nargs="+",
        default=[],
        help="hosts from which images may be fetched, '*' for all public ones; default: none",
    )
    parser.add_argument(
        "--allowed-local-media-path",
        help="folder whose image files requests may name; default: none",
    )
    parser.add_argument(
        "--log-prompts", action="store_true", help="write the bodies of requests to the log"
    )
    parser.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--bandwidth",
        type=real(0, 1e6, exclusive=True),
        help="the device's memory bandwidth in GB/s, for the metric mbu; default: that of a known"
        " GPU",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits of requests")
    group.add_argument(
        "--max-waiting",
        type=integer(1, 10**6),
        default=Limits.max_waiting,
        help="requests that may wait; those after them get status 429 (default: %(default)s)",
    )
    group.add_argument(
        "--max-rollouts",
        type=shared.WIDTH,
        default=Limits.max_rollouts,
        help="rollouts of a request at a time: n, or a round's width (default: %(default)s)",
    )
    group.add_argument(
        "--max-images",
        type=integer(0, 10**4),
        default=Limits.max_images,
        help="per request (default: %(default)s)",
    )
    group.add_argument(
        "--max-body-mib",
        type=integer(1, 4096),
        default=Limits.max_body_bytes // MIB,
        help="of a body (default: %(default)s)",
    )
    group.add_argument(
        "--max-image-mib",
        type=integer(1, 256),
        default=Limits.max_image_bytes // MIB,
        help="of an image file (default: %(default)s)",
    )
    group.add_argument(
        "--max-image-pixels",
        type=integer(1, 89_478_485),
        default=Limits.max_image_pixels,
        help="of an image (default: %(default)s)",
    )
    group.add_argument(
        "--timeout",
        type=real(0, 1e7, exclusive=True),
        default=Limits.timeout_s,
        help="seconds from a request's arrival to the end of its answer (default: %(default)g)",
    )


def _add_replicas(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several replicas of the model, with Ray Serve")
    group.add_argument(
        "--replicas",
        type=integer(1, 10**4),
        help="replicas of the model, each on a GPU or with --threads CPUs; --kv-tokens and"
        " --max-waiting are for each; default: the model in this process, without Ray",
    )
    group.add_argument(
        "--ray-address",
        help="HOST:PORT of a Ray cluster that has the same packages and model files; default: a"
        " cluster on this machine, for as long as the server runs",
    )


def run(options: argparse.Namespace) -> int:
    """The `serve` command; runs until a signal ends it. Raises InputError for invalid options."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"serve needs the package {error.name}: pip install 'step3vl-pacore[serve]'"
        ) from None
    from pacore_sched.cli.inputs import model_identity
    from pacore_sched.serve.http.app import make_app
    from pacore_sched.serve.http.logs import log_to_stderr
    from pacore_sched.serve.http.server import Server, bound_socket, url_of
    from pacore_sched.serve.saved import SavedProblems

    keys = _keys(options)
    _media_rules(options)
    if not all(_names(options)):
        raise InputError("--served-model-name is empty")
    if options.replicas:
        if options.debug:
            raise InputError("--debug does not go with --replicas")
        _run_replicas(options, keys)
        return 0
    if options.ray_address:
        raise InputError("--ray-address needs --replicas")
    saved = None
    if options.journal:
        identity: object = model_identity(options.model)
        if options.rope_scaling is not None:
            identity = [identity, options.rope_scaling]
        saved = SavedProblems(Path(options.journal), identity)
    with bound_socket(options.host, options.port) as listener:  # before minutes of loading
        context = replace(make_context(options), saved=saved)
        service, engine = context.service, context.service.engine
        log_to_stderr()
        app = make_app(context, keys=keys, log_prompts=options.log_prompts, debug=options.debug)
        logging.getLogger("pacore_sched.serve").info(
            "listening",
            extra={
                "url": f"{url_of(listener)}/v1",
                "models": context.names.listed,
                "kv_tokens": engine.executor.num_pages * engine.executor.page_size,
            },
        )
        Server(app, service, options.drain_seconds).run(sockets=[listener])
    return 0


def make_context(options: argparse.Namespace) -> "Context":
    """The model of the options and its service, for the server's routes."""
    from pacore_sched.serve.api.context import Context
    from pacore_sched.serve.api.names import Names
    from pacore_sched.serve.engine_metrics import EngineMetrics
    from pacore_sched.serve.metrics import Metrics
    from pacore_sched.serve.service import Service

    model = shared.load_model(options)
    neighbours = (options.replicas or 1) if model.device.type == "cpu" else 1
    engine = shared.make_engine(options, model, replicas=neighbours)
    names = _names(options)
    metrics = Metrics(names[0])
    service = Service(model, engine, _limits(options), metrics)
    metrics.registry.register(EngineMetrics(service, _bandwidth(options, model.device)))
    return Context(service, Names(names), _media_rules(options))


def _run_replicas(options: argparse.Namespace, keys: tuple[str, ...]) -> None:
    from pacore_sched.replicas.cluster import connected
    from pacore_sched.serve.api.names import Names
    from pacore_sched.serve.http.logs import log_to_stderr
    from pacore_sched.serve.http.server import bound_socket

    if options.journal:
        raise InputError(
            "--journal does not go with --replicas: a request that is sent again may reach another"
            " replica"
        )
    shared.check_model(options.model)
    gpus, cpus = shared.resources(options)
    with (
        bound_socket(options.host, options.port) as listener,
        connected(options.ray_address, options.replicas, gpus=gpus, cpus=cpus),
    ):
        from pacore_sched.replicas.serve.run import serve_replicas

        log_to_stderr()
        serve_replicas(
            listener,
            partial(make_context, shared.for_workers(options)),
            _limits(options),
            replicas=options.replicas,
            gpus=gpus,
            cpus=cpus,
            keys=keys,
            models=Names(_names(options)).listed,
            drain_s=options.drain_seconds,
            log_prompts=options.log_prompts,
        )


def _names(options: argparse.Namespace) -> list[str]:
    return options.served_model_name or [options.model]


def _keys(options: argparse.Namespace) -> tuple[str, ...]:
    """The API keys. Raises InputError for one that no request could have."""
    given = options.api_key
    if given is None:
        given = [os.environ[KEY_VARIABLE]] if KEY_VARIABLE in os.environ else []
    for key in given:
        if not key or key != key.strip() or not (key.isascii() and key.isprintable()):
            raise InputError(
                f"an API key (--api-key, {KEY_VARIABLE}) must be printable ASCII, without blanks"
                " at its ends, and not empty"
            )
    return tuple(given)


def _limits(options: argparse.Namespace) -> Limits:
    return Limits(
        max_waiting=options.max_waiting,
        max_rollouts=options.max_rollouts,
        max_images=options.max_images,
        max_body_bytes=options.max_body_mib * MIB,
        max_image_bytes=options.max_image_mib * MIB,
        max_image_pixels=options.max_image_pixels,
        timeout_s=options.timeout,
    )


def _media_rules(options: argparse.Namespace) -> "MediaRules":
    from pacore_sched.serve.images import MediaRules

    folder = options.allowed_local_media_path
    if folder is not None and not os.path.isdir(folder):
        raise InputError(f"--allowed-local-media-path {folder}: there is no such folder")
    return MediaRules(
        domains=frozenset(options.allowed_media_domains),
        local_path=Path(folder) if folder else None,
        max_bytes=options.max_image_mib * MIB,
    )


def _bandwidth(options: argparse.Namespace, device: "torch.device") -> float | None:
    """The device's memory bandwidth in bytes/s; None if it is not known."""
    import torch

    if options.bandwidth:
        return options.bandwidth * 1e9
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    known = next((machine for machine in MACHINES if machine in name), None)
    return find_machine(known).copy_gb_s * 1e9 if known else None
