"""Fetches a file over HTTP for a client who is not trusted: from public addresses only, within
limits of size and time, without redirects, proxies or credentials.
"""

import contextlib
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import TypeVar
from urllib.parse import SplitResult, quote, urlsplit

from model.errors import InputError, shown

T = TypeVar("T")

BLOCK = 2**16  # bytes read at a time
SAFE = "/%!$&'()*+,;=:@-._~"  # in paths; other characters are percent-encoded
# Addresses that Python, in some of its versions, takes for global.
NOT_PUBLIC = [
    ipaddress.ip_network(network)
    for network in ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2002::/16", "3fff::/20")
]
UNICAST = ipaddress.ip_network("2000::/3")  # all global unicast addresses of IPv6
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # the last 32 bits are an IPv4 address


def is_public(address: str) -> bool:
    """Whether an IP address is a unicast address of the public internet.

    IPv4 addresses inside IPv6 ones are refused (mapped, 6to4, Teredo), except NAT64 to a public
    one, by which networks without IPv4 reach it.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if ip in NAT64:
        return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    if ip.version == 6 and ip not in UNICAST:
        return False
    return ip.is_global and not ip.is_multicast and not any(ip in net for net in NOT_PUBLIC)


def checked_url(url: str) -> tuple[SplitResult, str]:
    """An http or https URL in parts, and its host as sent to servers: lower case, IDNA.

    Raises InputError for a URL with credentials, and for one that is malformed.
    """
    try:
        parts = urlsplit(url)
        host = ascii_host(parts.hostname or "")
        valid = bool(host) and parts.port != 0 and url.isprintable() and " " not in url
    except ValueError:  # a port or brackets; UnicodeError of IDNA
        valid = False
    if not valid:
        raise InputError(f"the image URL {shown(url)} is not valid")
    if "@" in parts.netloc:
        raise InputError("the image URL holds credentials, which are not sent; leave them out")
    return parts, host


def ascii_host(host: str) -> str:
    """Raises UnicodeError for a name that cannot be one."""
    return host.rstrip(".").encode("idna").decode().lower()


def fetch(url: str, *, max_bytes: int, timeout_s: float) -> bytes:
    """The bytes at an http or https URL.

    The host is resolved once, and the connection made to an address of that answer; all its
    addresses must be public. `timeout_s` is for everything together. Raises InputError for any
    other answer than 200 with at most `max_bytes` bytes.
    """
    parts, host = checked_url(url)
    name, deadline = f"the image at {host}", time.monotonic() + timeout_s
    port = parts.port or (443 if parts.scheme == "https" else 80)
    late = InputError(f"{name} took longer than {timeout_s:g} s; send it as a data URL")
    try:
        found = _in_time(lambda: _resolved(host, port), timeout_s)
        if not all(map(is_public, found)):
            raise InputError(
                f"{name} is not fetched: its address is not public; send it as a data URL"
            )
        sock = _connected(found, port, deadline)
        with contextlib.closing(sock), _cut_at(deadline, sock) as cut:
            try:
                data = _answer(sock, parts, host, port, name, max_bytes)
            finally:
                if cut.is_set():  # the error, or what looks like the end, came of that
                    raise late
            return data
    except TimeoutError:
        raise late from None
    except (OSError, HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"{name} cannot be fetched: {reason}") from None


def _resolved(host: str, port: int) -> list[str]:
    """The addresses of a host, or of a number in any form that the system takes for one."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def _in_time(function: Callable[[], T], timeout_s: float) -> T:
    """What the function returns or raises; TimeoutError if that takes longer, as getaddrinfo may,
    which has no timeout. It then continues in its thread."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(timeout_s)


def _connected(addresses: list[str], port: int, deadline: float) -> socket.socket:
    """A connection to the first of the addresses that answers. Raises OSError for none."""
    error = OSError("the host has no address")
    for address in addresses:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        try:
            return socket.create_connection((address, port), timeout=left)
        except OSError as failure:
            error = failure
    raise error


@contextlib.contextmanager
def _cut_at(deadline: float, sock: socket.socket) -> Iterator[threading.Event]:
    """Ends the connection at the deadline: timeouts of a socket are for one read, and a server may
    send a byte now and then. The event says whether that has happened."""
    cut = threading.Event()

    def end() -> None:
        cut.set()
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(deadline - time.monotonic(), 0), end)
    timer.daemon = True
    timer.start()
    try:
        yield cut
    finally:
        timer.cancel()


def _answer(
    sock: socket.socket, parts: SplitResult, host: str, port: int, name: str, max_bytes: int
) -> bytes:
    """The body of the answer to a GET request on an open connection."""
    connection = HTTPConnection(host, port)
    duplicate = sock.dup()  # TLS takes a socket over, and `_cut_at` needs one to shut down
    if parts.scheme == "https":
        context = ssl.create_default_context()
        connection = HTTPSConnection(host, port, context=context)
        duplicate = context.wrap_socket(duplicate, server_hostname=host)
    connection.sock = duplicate
    connection.auto_open = 0  # never resolve and connect by itself
    target = quote(parts.path or "/", safe=SAFE)
    if parts.query:
        target += "?" + quote(parts.query, safe=SAFE + "?")
    with contextlib.closing(connection):
        connection.request("GET", target, headers={"User-Agent": "step3vl-pacore"})
        return _body(connection.getresponse(), name, max_bytes)


def _body(response: HTTPResponse, name: str, max_bytes: int) -> bytes:
    if 300 <= response.status < 400:
        raise InputError(f"{name} was redirected, which is not followed; send the final URL")
    if response.status != 200:
        raise InputError(f"{name} cannot be fetched: the answer is {response.status}, not 200")
    data = bytearray()
    while len(data) <= max_bytes and (block := response.read1(BLOCK)):
        data += block
    if len(data) > max_bytes:
        raise InputError(f"{name} is too large: it may have at most {max_bytes:,} bytes")
    if response.length:  # the rest of what the answer announced
        raise InputError(f"{name} cannot be fetched: the answer ended early")
    return bytes(data)
