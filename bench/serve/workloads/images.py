"""Random images of a resolution, as data URLs."""

import argparse
import base64
import io
import random

RESOLUTIONS = {"360p": (640, 360), "720p": (1280, 720), "1080p": (1920, 1080)}
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
    """A JPEG of random soft shapes: its size as a file is like that of a photo, not of noise."""
    from PIL import Image

    small = Image.frombytes("RGB", (16, 16), draw.randbytes(16 * 16 * 3))
    file = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
