"""Images in chat messages: from an `image_url` to a source for `model.vision.image.load_image`."""

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from model.errors import InputError, shown
from model.text.files import open_file
from model.vision.reading.limits import MAX_BYTES
from pacore_sched.serve.public_http import ascii_host, checked_url, fetch


@dataclass(frozen=True)
class MediaRules:
    """What the server reads for its clients; by default only data URLs.

    `domains` (--allowed-media-domains): the hosts, without their subdomains, from which images are
    fetched if their addresses are public; "*" allows all. `local_path`
    (--allowed-local-media-path): the directory below which files are read. A file has at most
    `max_bytes`; fetching takes at most `timeout_s` seconds.
    """

    domains: frozenset[str] = frozenset()
    local_path: Path | None = None
    max_bytes: int = MAX_BYTES
    timeout_s: float = 5.0  # as in vLLM

    def allows(self, host: str) -> bool:
        """Whether a host, in lower case and IDNA, is one of `domains`."""
        return "*" in self.domains or host in {ascii_host(domain) for domain in self.domains}


def image_source(url: str, rules: MediaRules) -> str | bytes:
    """A data URL, which is not checked here, or the bytes of an image file.

    `url` is a data URL, an http or https URL, a file URL, or a path, relative to
    `rules.local_path`. Raises InputError for what the rules do not allow and what cannot be read.
    """
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        return url
    if scheme in ("http", "https"):
        return _fetched(url, rules)
    if "://" in url and scheme != "file":
        raise InputError(
            f"the image URL {shown(url)} is not allowed; it must begin with data:, https:// or"
            " http://"
        )
    return _local(url, rules)


def _fetched(url: str, rules: MediaRules) -> bytes:
    _, host = checked_url(url)
    if not rules.allows(host):
        raise InputError(
            f"images from {host} are not allowed; send a data URL, or start the server with"
            f" --allowed-media-domains {host}"
        )
    return fetch(url, max_bytes=rules.max_bytes, timeout_s=rules.timeout_s)


def _local(url: str, rules: MediaRules) -> bytes:
    if rules.local_path is None:
        raise InputError(
            "local images are not allowed; send a data URL, or start the server with"
            " --allowed-local-media-path DIRECTORY"
        )
    name, allowed = f"the image {shown(url)}", rules.local_path.resolve()
    try:
        parts = urlsplit(url)
        is_url = parts.scheme == "file"
        file = (allowed / (unquote(parts.path) if is_url else url)).resolve()
    except (OSError, RuntimeError, ValueError):  # brackets in a URL, a loop of links, a NUL
        raise InputError(f"{name} is not a valid path") from None
    if is_url and parts.netloc not in ("", "localhost"):
        raise InputError(f"{name} names a host; it must be file:///PATH")
    if not file.is_relative_to(allowed):
        raise InputError(f"{name} is outside the directory of --allowed-local-media-path")
    with open_file(file, name) as opened:
        if os.fstat(opened.fileno()).st_size > rules.max_bytes:
            raise InputError(f"{name} is too large: it may have at most {rules.max_bytes:,} bytes")
        return opened.read(rules.max_bytes)
