"""Which images the server reads for its clients: data URLs, allowed hosts and allowed files."""

import base64
import os
import socket

import pytest

from model.errors import InputError
from model.vision.image import load_image
from pacore_sched.serve import public_http
from pacore_sched.serve.images import MediaRules, image_source
from tests.model.vision.images import encoded, photo
from tests.pacore_sched.serve.http_server import Resolver, response, serving

PNG = encoded(photo(), "PNG")


@pytest.fixture
def names(monkeypatch):
    """The names that resolve, here to loopback addresses, which count as public."""
    resolver = Resolver({})
    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    monkeypatch.setattr(public_http, "is_public", lambda ip: ip == "127.0.0.1")
    return resolver.names


@pytest.fixture
def folder(tmp_path):
    """allowed/: an image, a link to it, and ways out; outside.png."""
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    for file in (allowed / "a b.png", tmp_path / "outside.png", tmp_path / "allowed.png"):
        file.write_bytes(PNG)
    (allowed / "link.png").symlink_to("a b.png")
    (allowed / "out.png").symlink_to("../outside.png")
    (allowed / "up").symlink_to("..")
    (allowed / "loop").symlink_to("loop")
    os.mkfifo(allowed / "fifo")
    return allowed


def test_every_source_is_an_image(names, folder):
    """Guards the whole way to pixels, for each kind of URL."""
    names["photos.example"] = ["127.0.0.1"]
    (folder.parent / "linked").symlink_to(folder)
    rules = MediaRules(frozenset({"photos.example"}), folder.parent / "linked")
    with serving(lambda sock, _: sock.sendall(response(PNG))) as port:
        for url in (
            f"data:image/png;base64,{base64.b64encode(PNG).decode()}",
            f"http://photos.example:{port}/a.png",
            f"file://{folder}/a%20b.png",
            f"{folder}/a b.png",
            "link.png",
            f"file://{folder.parent}/linked/a%20b.png",
        ):
            assert load_image(image_source(url, rules)).tobytes() == photo().tobytes()


@pytest.mark.parametrize(
    ("domains", "host", "allowed"),
    [
        (set(), "photos.example", False),
        ({"photos.example"}, "Photos.Example.", True),
        ({"Photos.Example"}, "photos.example", True),
        ({"b\u00fccher.example"}, "xn--bcher-kva.example", True),
        ({"xn--bcher-kva.example"}, "B\u00dcCHER.example", True),
        ({"photos.example"}, "my.photos.example", False),
        ({"photos.example"}, "photos.example.evil.example", False),
        ({"photos.example"}, "evilphotos.example", False),
        ({"*"}, "photos.example", True),
    ],
)
def test_domains(names, domains, host, allowed):
    """Guards against matching parts of names, and against names that are only written otherwise."""
    for name in ("photos.example", "my.photos.example", "xn--bcher-kva.example"):
        names[name] = ["127.0.0.1"]
    rules = MediaRules(frozenset(domains))
    with serving(lambda sock, _: sock.sendall(response(PNG))) as port:
        url = f"http://{host}:{port}/photos.example?photos.example#photos.example"
        if allowed:
            assert image_source(url, rules) == PNG
        else:
            with pytest.raises(InputError, match="--allowed-media-domains"):
                image_source(url, rules)


@pytest.mark.parametrize("domains", [{"*"}, {"intranet.example"}])
def test_private_hosts_are_never_allowed(names, domains):
    """Guards the operator's network from its clients, even if the name is listed."""
    names["intranet.example"] = ["10.0.0.1"]
    with pytest.raises(InputError, match="not public"):
        image_source("https://intranet.example/a.png", MediaRules(frozenset(domains)))


@pytest.mark.parametrize(
    "url", ["https://photos.example@evil.example/", "https://evil.example\\@photos.example/"]
)
def test_credentials_hide_no_host(names, url):
    with pytest.raises(InputError, match="credentials"):
        image_source(url, MediaRules(frozenset({"*"})))


@pytest.mark.parametrize(
    "url",
    [
        *("../outside.png", "../allowed.png", "out.png", "up/outside.png", "/etc/passwd"),
        *("file:///etc/passwd", "file://{}/../outside.png", "file://{}/%2e%2e/outside.png"),
        *("FILE://{}/out.png", "{}/../outside.png", "../missing.png"),
    ],
)
def test_ways_out_of_the_directory(folder, url):
    """Guards against `..`, links and escapes; a file that is missing there gets the same answer."""
    with pytest.raises(InputError, match="outside the directory of --allowed-local-media-path"):
        image_source(url.format(folder), MediaRules(local_path=folder))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("missing.png", "No such file"),
        ("fifo", "a pipe, socket or device"),
        (".", "a directory"),
        ("loop", "not a valid path"),
        ("a\0b", "not a valid path"),
        ("file:///a%00b", "not a valid path"),
        ("file://[/a.png", "not a valid path"),
        ("file://other.example/a.png", "file:///PATH"),
        ("ftp://photos.example/a.png", "must begin with data:"),
        ("gopher://127.0.0.1/", "must begin with data:"),
    ],
)
def test_other_paths_and_urls(folder, url, message):
    with pytest.raises(InputError, match=message):
        image_source(url, MediaRules(local_path=folder))


def test_limits_of_files(folder):
    """Guards the rules' defaults and sizes."""
    for url in ("a b.png", f"file://{folder}/a%20b.png"):
        with pytest.raises(InputError, match="--allowed-local-media-path"):
            image_source(url, MediaRules())
    rules = MediaRules(local_path=folder, max_bytes=len(PNG))
    assert image_source("a b.png", rules) == PNG
    with pytest.raises(InputError, match="at most"):
        image_source("a b.png", MediaRules(local_path=folder, max_bytes=len(PNG) - 1))
