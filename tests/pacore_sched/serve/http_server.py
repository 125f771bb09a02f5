"""A server for tests that answers every connection as a function says, and a resolver for it."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator

REAL_GETADDRINFO = socket.getaddrinfo


@contextlib.contextmanager
def serving(
    answer: Callable[[socket.socket, str], None], tls: ssl.SSLContext | None = None
) -> Iterator[int]:
    """The port of a server on 127.0.0.1; `answer` gets a connection and its request's head."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def connection(sock: socket.socket) -> None:
            with sock, contextlib.suppress(OSError):  # the client may go away
                served = tls.wrap_socket(sock, server_side=True) if tls else sock
                with served:
                    answer(served, served.recv(2**16).decode("latin-1"))

        def accept() -> None:
            with contextlib.suppress(OSError):  # closed
                while True:
                    sock, _ = listener.accept()
                    threading.Thread(target=connection, args=[sock], daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`


def response(body: bytes, status: str = "200 OK", **headers: object) -> bytes:
    headers = {"Content-Length": len(body), **headers}
    lines = [f"HTTP/1.1 {status}", *(f"{key}: {value}" for key, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Resolver:
    """Stands in for socket.getaddrinfo: knows `names`, loopback addresses and nothing else."""

    def __init__(self, names: dict[str, list[str]]) -> None:
        self.names, self.asked = names, []

    def __call__(self, host, port, *args, **options):
        self.asked.append(host)
        if host in self.names:
            kind = socket.SOCK_STREAM
            return [(socket.AF_INET, kind, 6, "", (ip, port)) for ip in self.names[host]]
        if host.startswith("127."):
            return REAL_GETADDRINFO(host, port, *args, **options)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
