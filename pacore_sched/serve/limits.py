"""What a server accepts, where its user may choose; other limits are in api/requests.py."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of one server; each has an option of `serve`.

    max_waiting: requests that wait to be started; those after them get status 429
    max_rollouts: rollouts that one request may ask for at a time: `n`, or a PaCoRe round's width
    max_images: of one chat request
    max_body_bytes, max_image_bytes, max_image_pixels: of a body, of an encoded and a decoded image
    body_timeout_s: for a body to arrive
    timeout_s: from the arrival of a request to the end of its answer
    """

    max_waiting: int = 512
    max_rollouts: int = 128
    max_images: int = 64
    max_body_bytes: int = 64 << 20
    max_image_bytes: int = 20 << 20
    max_image_pixels: int = 36_000_000
    body_timeout_s: float = 60.0
    timeout_s: float = 3600.0
