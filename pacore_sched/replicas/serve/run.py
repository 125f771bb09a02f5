"""Runs replicas with Ray Serve, and the HTTP server before them."""

import asyncio
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress

from ray import serve
from ray.serve.config import ProxyLocation
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.schema import ApplicationStatusOverview
from starlette.types import Message

from model.errors import InputError
from pacore_sched.replicas.serve import running
from pacore_sched.replicas.serve.forwarding import ForwardedRequest
from pacore_sched.replicas.serve.front import Front, ReplicaLost
from pacore_sched.replicas.serve.replica import Replica
from pacore_sched.replicas.serve.router import TargetRouter
from pacore_sched.serve.api.context import Context
from pacore_sched.serve.http.guard import Guard
from pacore_sched.serve.http.server import Server, url_of
from pacore_sched.serve.limits import Limits

HEALTH_S = 2.0  # between health checks of a replica
SEEN_S = 60.0  # for the router to learn of the replicas
LOG = logging.getLogger("pacore_sched.serve")
UNLIMITED = 1_000_000  # requests at a replica: its own limits hold


def serve_replicas(
    listener: socket.socket,
    make_context: Callable[[], Context],
    limits: Limits,
    *,
    replicas: int,
    gpus: float,
    cpus: float,
    keys: Sequence[str],
    models: Sequence[str],
    drain_s: float,
    log_prompts: bool,
) -> None:
    """Serve until a signal; Ray must be connected (replicas/cluster.py).

    SIGHUP restarts the replicas, one after the other.

    make_context: loads the model, in the replica's process
    models: the served names, for the log

    Raises InputError if the replicas do not start, with what `make_context` raised.
    """
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    deployment = serve.deployment(
        num_replicas=replicas,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=UNLIMITED,
        health_check_period_s=HEALTH_S,
        graceful_shutdown_timeout_s=drain_s,
        max_constructor_retry_count=1,
        request_router_config={"request_router_class": TargetRouter},
    )(Replica)
    app = f"pacore-{socket.gethostname()}-{os.getpid()}"  # other hosts' servers are others
    try:
        serve.start(proxy_location=ProxyLocation.Disabled)
        target = deployment.bind(make_context, log_prompts=log_prompts)

        def deploy() -> DeploymentHandle:
            """Start the replicas; those that run are replaced."""
            try:
                return serve.run(target, name=app, route_prefix=None)
            except RuntimeError:
                raise InputError(_why_not(serve.status().applications[app])) from None

        handle = deploy()
        first = handle.kv_tokens.remote(ForwardedRequest("", "GET", "")).result(timeout_s=SEEN_S)
        _wait_for(replicas)
        front = Front(RayReplicas(handle), limits)
        LOG.info(
            "listening",
            extra={
                "url": f"{url_of(listener)}/v1",
                "models": models,
                "kv_tokens": first * replicas,
                "replicas": running.names,
            },
        )
        _on_sighup(deploy)
        Server(Guard(front, front, keys), front, drain_s).run(sockets=[listener])
    finally:
        with suppress(Exception):
            serve.delete(app)


def _on_sighup(deploy: Callable[[], object]) -> None:
    """Deploy again at SIGHUP, in a thread; Ray Serve replaces one replica after the other."""
    under_way = threading.Lock()

    def restart() -> None:
        with under_way:
            LOG.info("restarting")
            try:
                deploy()
            except InputError as error:
                LOG.error("restart failed", extra={"reason": str(error)})
            else:
                LOG.info("restarted")

    def begin(*_: object) -> None:
        if not under_way.locked():
            threading.Thread(target=restart, daemon=True).start()

    signal.signal(signal.SIGHUP, begin)


class RayReplicas:
    """The replicas of a deployment, as the front calls them."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle.options(stream=True)

    def running(self) -> Sequence[str]:
        return running.names

    async def call(self, request: ForwardedRequest) -> AsyncGenerator[list[Message], None]:
        parts = self._handle.answer.remote(request)
        assert isinstance(parts, DeploymentResponseGenerator)
        whole = False
        try:
            async for part in parts:
                yield part
            whole = True
        except asyncio.CancelledError:
            raise
        except Exception as error:  # Ray has many kinds for a replica that ended
            whole = True
            raise ReplicaLost(request.replica) from error
        finally:
            if not whole:
                parts.cancel()


def _why_not(status: ApplicationStatusOverview) -> str:
    """Why replicas do not start: what `make_context` raised, whose traceback ends the message."""
    messages = [status.message, *(inner.message for inner in status.deployments.values())]
    last = messages[-1].strip().rpartition("\n")[2]
    wrong = re.search(r"InputError: (.*)", last)
    return wrong[1] if wrong else f"the replicas do not start: {last}"


def _wait_for(replicas: int) -> None:
    deadline = time.monotonic() + SEEN_S
    while len(running.names) < replicas and time.monotonic() < deadline:
        time.sleep(0.02)
