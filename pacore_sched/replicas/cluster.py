"""The Ray cluster that replicas run on: one of our own on this machine, or one that is joined.

A cluster of our own has no dashboard, and ends with the context. If this process is killed, the
kernel ends Ray's processes (PR_SET_PDEATHSIG), and with them the replicas; two idle agents of Ray's
follow within about a minute.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from model.errors import InputError

# Before Ray is imported: no token file in the home folder, and no report of usage. Ray would also
# run its workers at nice 15: next to a busy process, a replica would hardly run.
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
}
OBJECT_STORE_BYTES = 256 << 20  # replicas exchange text and tokens
CONNECT_S = 5.0
ANSWER_S = 15.0  # most of which is the import of Ray, on a slow machine
# Ray itself goes on trying for two minutes, and then ends the process.
PROBE = "import sys, ray; ray._raylet.GcsClient(address=sys.argv[1])"


@contextmanager
def connected(address: str | None, replicas: int, *, gpus: float, cpus: float) -> Iterator[None]:
    """Ray, with room for that many replicas, of `gpus` and `cpus` each, until the context ends.

    address: HOST:PORT of the cluster's head node; None starts a cluster on this machine

    Raises InputError if Ray is not installed, the cluster cannot be reached, has another version of
    Ray or Python, or has no room.
    """
    _require_ray()
    import ray

    if address is not None:
        _probe(address)
    where: dict[str, Any] = {"address": address}
    if address is None:
        where = {
            "address": "local",  # not one that runs already
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    in_main = threading.current_thread() is threading.main_thread()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        try:
            ray.init(**where, log_to_driver=False, logging_level=logging.ERROR)
        except (RuntimeError, ConnectionError, ValueError) as error:
            why = " ".join(str(error).split())
            raise InputError(f"{_name(address)} cannot be used: {why}") from None
        finally:
            # Ray replaces the handler by one that ends the process, and the context with it.
            if in_main and callable(on_sigterm):
                signal.signal(signal.SIGTERM, on_sigterm)
        # Ray would also print to stdout, which is ours, that a replica was killed.
        ray._private.worker._worker_logs_enabled = False
        check_room(ray.nodes(), ray.available_resources(), replicas, gpus=gpus, cpus=cpus)
        yield
    finally:
        ray.shutdown()


def check_room(
    nodes: Sequence[Mapping[str, Any]],
    available: Mapping[str, float],
    replicas: int,
    *,
    gpus: float,
    cpus: float,
) -> None:
    """Raise InputError if a cluster has no room for that many replicas.

    nodes: as of ray.nodes()
    available: as of ray.available_resources(): what other programs have left
    """
    each = {name: count for name, count in (("GPU", gpus), ("CPU", cpus)) if count}
    live = [node["Resources"] for node in nodes if node["Alive"]]
    for name, count in each.items():
        # A replica is on one node. The tolerance is for thirds of a CPU.
        room = sum(int(node.get(name, 0) / count + 1e-6) for node in live)
        free = int(available.get(name, 0) / count + 1e-6)
        if min(room, free) < replicas:
            total = sum(node.get(name, 0) for node in live)
            raise InputError(
                f"--replicas {replicas}: each needs {count:g} {name}, and the Ray cluster has"
                f" {total:g}, of which {available.get(name, 0):g} free: room for {min(room, free)}"
            )


def _require_ray() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray  # noqa: F401
    except ImportError:
        raise InputError(
            "--replicas needs the package ray: pip install 'step3vl-pacore[ray]'"
        ) from None


def _probe(address: str) -> None:
    """Raise InputError, within seconds, if no Ray cluster answers at an address."""
    host, _, port = address.rpartition(":")
    if not (host and port.isascii() and port.isdigit()) or "/" in host:
        raise InputError(f"--ray-address {address}: it must be HOST:PORT of a Ray head node")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"--ray-address {address} cannot be reached: {why}") from None
    try:
        probe = [sys.executable, "-c", PROBE, address]
        ok = subprocess.run(probe, capture_output=True, timeout=ANSWER_S).returncode == 0
    except subprocess.TimeoutExpired:
        ok = False
    if not ok:
        raise InputError(f"--ray-address {address}: what answers there is no Ray cluster")


def _name(address: str | None) -> str:
    return "a Ray cluster on this machine" if address is None else f"--ray-address {address}"
