"""Random images of a resolution, as data URLs."""

import argparse
import base64
import random

from bench.inputs.photos import jpeg

RESOLUTIONS = {
    "360p": (640, 360),
    "720p": (1280, 720),
    "1080p": (1920, 1080),
    "4k": (3840, 2160),
}
MAX_SIDE = 8192


def resolution(text: str) -> tuple[int, int]:
    """The `type` of an option: a name, or WIDTHxHEIGHT in pixels."""
    if text in RESOLUTIONS:
        return RESOLUTIONS[text]
    sides = text.split("x")
    if len(sides) == 2 and all(s.isdecimal() and len(s) < 5 and s[0] != "0" for s in sides):
        width, height = map(int, sides)
        if max(width, height) <= MAX_SIDE:
            return width, height
    raise argparse.ArgumentTypeError(
        f"{text[:40]!r} is not {', '.join(RESOLUTIONS)} or WIDTHxHEIGHT, up to {MAX_SIDE} each"
    )


def data_url(draw: random.Random, size: tuple[int, int]) -> str:
    """A random photo."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg(draw, size)).decode()}"
