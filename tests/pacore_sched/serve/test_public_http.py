"""Fetching for clients who are not trusted, from a server on this machine."""

import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.errors import InputError
from pacore_sched.serve import public_http
from pacore_sched.serve.public_http import fetch, is_public
from tests.pacore_sched.serve.http_server import Resolver, response, serving

HOST = "photos.example"


@pytest.fixture(autouse=True)
def resolver(monkeypatch):
    """Nothing leaves this machine; 127.0.0.1 counts as public."""
    resolver = Resolver({HOST: ["127.0.0.1"]})
    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    monkeypatch.setattr(public_http, "is_public", lambda ip: ip == "127.0.0.1" or is_public(ip))
    return resolver


def fetched(answer, path="/a.png", *, host=HOST, tls=None, max_bytes=1000, timeout_s=5.0):
    """What is fetched from a server that answers with bytes or as a function does."""
    if isinstance(answer, bytes):
        data, answer = answer, lambda sock, request: sock.sendall(data)
    with serving(answer, tls) as port:
        url = f"http{'s' if tls else ''}://{host}:{port}{path}"
        return fetch(url, max_bytes=max_bytes, timeout_s=timeout_s)


def test_a_file(resolver, monkeypatch):
    """Guards the request: one question to the resolver, no proxy, path and query as in the URL."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    requests = []

    def answer(sock, request):
        requests.append(request)
        sock.sendall(response(b"pixels"))

    assert fetched(answer, "/a%20b/\u00e9.png?size=1&key=a/b%2B#top") == b"pixels"
    first, host, *_ = requests[0].split("\r\n")
    assert first == "GET /a%20b/%C3%A9.png?size=1&key=a/b%2B HTTP/1.1"
    assert host.startswith(f"Host: {HOST}:")
    assert resolver.asked == [HOST, "127.0.0.1"]  # then it connects to that address


@pytest.mark.parametrize("url", ["http://{}", "HTTP://Photos.Example.:{}?x"])
def test_hosts_and_paths_are_normalised(url, resolver):
    with serving(lambda sock, _: sock.sendall(response(b"pixels"))) as port:
        url = url.format(port) if ":{}" in url else url.format(f"{HOST}:{port}")
        assert fetch(url, max_bytes=100, timeout_s=5.0) == b"pixels"


@pytest.mark.parametrize(
    "head", [{}, {"Content-Length": ""}, {"Transfer-Encoding": "chunked", "Content-Length": ""}]
)
@pytest.mark.parametrize("size", [0, 1000, 1001, 10**6])
def test_size_is_bounded_while_reading(head, size):
    """Guards against bodies larger than announced, or announced as nothing."""
    body = b"x" * size
    sent = b"%x\r\n%s\r\n0\r\n\r\n" % (size, body) if len(head) == 2 and size else body
    sent = b"0\r\n\r\n" if len(head) == 2 and not size else sent
    headers = {"Content-Length": size, **head}
    data = response(b"", **{key: value for key, value in headers.items() if value != ""})
    if headers["Content-Length"] == "":
        data = data.replace(b"Content-Length: 0\r\n", b"")
    if size <= 1000:
        assert fetched(data + sent) == body
    else:
        with pytest.raises(InputError, match="at most 1,000 bytes"):
            fetched(data + sent)


def test_an_endless_answer_is_not_read():
    """Guards memory: the limit ends the answer, not the time."""

    def answer(sock, request):
        sock.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
        while True:
            sock.sendall(bytes(2**16))

    with pytest.raises(InputError, match="at most 1,000 bytes"):
        fetched(answer)


@pytest.mark.parametrize(("scheme", "port"), [("http", 80), ("https", 443)])
def test_default_ports(monkeypatch, scheme, port):
    tried = []
    monkeypatch.setattr(socket, "create_connection", lambda address, **_: tried.append(address))
    with pytest.raises(AttributeError):  # None is no socket
        fetch(f"{scheme}://{HOST}/", max_bytes=1, timeout_s=5.0)
    assert tried == [("127.0.0.1", port)]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (response(b"", "302 Found", Location="http://127.0.0.1/"), "redirect"),
        (response(b"no", "404 Not Found"), "404, not 200"),
        (response(b"part", "206 Partial Content"), "206, not 200"),
        (response(b"half", **{"Content-Length": 8}), "ended early"),
        (response(b"8\r\nhalf", **{"Transfer-Encoding": "chunked"}), "IncompleteRead"),
        (b"SSH-2.0-OpenSSH\r\n", "SSH-2.0"),
        (b"", "closed connection"),
    ],
)
def test_other_answers_are_refused(answer, message):
    with pytest.raises(InputError, match=message) as error:
        fetched(answer)
    assert HOST in str(error.value)


def slowly(data, beginning=b""):
    def answer(sock, request):
        sock.sendall(beginning)
        for byte in data:
            time.sleep(0.02)
            sock.sendall(bytes([byte]))

    return answer


@pytest.mark.parametrize(
    "answer",
    [
        slowly(response(b"x" * 500)),
        slowly(b"x" * 500, response(b"", **{"Content-Length": 500})),
        slowly(b"x" * 500, b"HTTP/1.0 200 OK\r\n\r\n"),  # ends with the connection
        slowly(b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
        lambda sock, request: sock.recv(1),  # never answers
    ],
    ids=["head", "body", "endless", "continue", "silent"],
)
def test_a_slow_answer_ends(answer):
    """Guards against a timeout that begins again with every byte."""
    start = time.monotonic()
    with pytest.raises(InputError, match="longer than 0.3 s"):
        fetched(answer, timeout_s=0.3)
    assert time.monotonic() - start < 3


def test_a_slow_resolver_ends(monkeypatch):
    """getaddrinfo has no timeout."""
    never = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: never.wait(5))
    with pytest.raises(InputError, match="longer than 0.1 s"):
        fetch(f"http://{HOST}/", max_bytes=1, timeout_s=0.1)
    never.set()


def test_threads_end():
    """Guards against a thread or timer left by each fetch."""
    before = set(threading.enumerate())
    for _ in range(5):
        fetched(response(b"pixels"), timeout_s=60)
        with pytest.raises(InputError):
            fetched(slowly(response(b"x" * 20)), timeout_s=0.1)
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://user:secret@photos.example/", "credentials"),
        ("http://user@photos.example/", "credentials"),
        ("http:///a.png", "not valid"),
        ("http://photos.example:99999/", "not valid"),
        ("http://photos.example:0/", "not valid"),
        ("http://[::1/", "not valid"),
        ("http://a..b/", "not valid"),
        (f"http://{'a' * 64}.example/", "not valid"),
        ("http://photos.example/a b", "not valid"),
        ("http://photos.example/\r\nX: y", "not valid"),
        ("http://nowhere.example/", "not known"),
    ],
)
def test_urls_are_checked(url, message):
    with pytest.raises(InputError, match=message) as error:
        fetch(url, max_bytes=1, timeout_s=5.0)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("addresses", [["10.0.0.1"], ["127.0.0.1", "192.168.0.1"]])
def test_every_address_must_be_public(resolver, addresses):
    """Guards against a host that mixes addresses: which one is used is the client's luck."""
    resolver.names[HOST] = addresses
    with pytest.raises(InputError, match="not public"):
        fetched(response(b"pixels"))


def test_addresses_are_tried_in_turn(resolver, monkeypatch):
    resolver.names[HOST] = ["127.0.0.2", "127.0.0.1"]  # nothing listens on the first
    monkeypatch.setattr(public_http, "is_public", lambda ip: True)
    assert fetched(response(b"pixels")) == b"pixels"
    assert resolver.asked == [HOST, "127.0.0.2", "127.0.0.1"]


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "0x7f000001", "2130706433", "127.1", "017700000001", "0",
             "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[::]"],
)  # fmt: skip
def test_no_form_of_loopback_is_reached(host, monkeypatch):
    """Guards against names and numbers that only the system's resolver understands."""
    monkeypatch.undo()
    with serving(lambda sock, _: sock.sendall(response(b"secret"))) as port:
        url = f"http://{host}:{port}/"
        with pytest.raises(InputError, match="not public|cannot be fetched"):
            fetch(url, max_bytes=100, timeout_s=5.0)


PRIVATE = [
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16"),
    *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16"),
    *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
    *("::/8", "100::/64", "2001::/32", "2001:2::/48", "2001:db8::/32", "2002::/16", "3fff::/20"),
    *("5f00::/16", "64:ff9b:1::/48", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8"),
    *("::ffff:0:0/96", "64:ff9b::10.0.0.0/104", "64:ff9b::169.254.0.0/112"),
]  # the registries of IANA, and what is translated to them


@given(st.sampled_from(PRIVATE), st.integers(0, 2**128 - 1))
def test_private_networks(network, offset):
    """Guards the table against Python's versions, which differ in what they call global."""
    net = ipaddress.ip_network(network)
    for at in (0, offset % net.num_addresses, net.num_addresses - 1):
        address = str(net[at])
        if not (net.version == 6 and address.startswith("64:ff9b::") and network == "::/8"):
            assert not is_public(address), address


@pytest.mark.parametrize(
    "address",
    ["1.1.1.1", "8.8.8.8", "93.184.215.14", "100.63.255.255", "100.128.0.0", "172.32.0.1",
     "2606:4700::1111", "2a00:1450:4001::200e", "2001:4860:4860::8888", "64:ff9b::808:808"],
)  # fmt: skip
def test_public_addresses(address):
    assert is_public(address)
    assert not is_public(f"{address}.")  # nor what is no address


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    names = ("-keyout", folder / "key.pem", "-out", folder / "cert.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=test", "-addext", f"subjectAltName=DNS:{HOST}",
         *names],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize(
    ("host", "trusted", "message"),
    [
        (HOST, True, None),
        ("other.example", True, "certificate is not valid for 'other.example'"),
        (HOST, False, "certificate verify failed"),
    ],
)
def test_certificates_are_verified(certificate, resolver, monkeypatch, host, trusted, message):
    """Guards https: the certificate must be for the host's name, not for its address."""
    resolver.names["other.example"] = ["127.0.0.1"]
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
    if message:
        with pytest.raises(InputError, match=message):
            fetched(response(b"pixels"), host=host, tls=server)
    else:
        assert fetched(response(b"pixels"), host=host, tls=server) == b"pixels"


def test_a_handshake_that_never_ends():
    """Guards the deadline before TLS: a server that does not speak it, or slowly."""
    with (
        serving(slowly(b"\x16\x03\x03\x40\x00" + b"x" * 500)) as port,
        pytest.raises(InputError, match="longer than 0.3 s"),
    ):
        fetch(f"https://{HOST}:{port}/", max_bytes=1, timeout_s=0.3)
