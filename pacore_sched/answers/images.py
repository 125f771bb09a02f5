"""Images of problems on their way into a model: encoded, then as its views."""

from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

from model.errors import InputError
from model.step3vl import Step3VL
from model.vision.image import Views, load_image, preprocess

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class ImageData:
    """An encoded image: the bytes of the file `name`, or if there are none, `name` is a data
    URL."""

    name: str
    data: bytes | None = None

    def load(self) -> "Image.Image":
        """Decode the image. Raises InputError if it is none."""
        if self.data is None:
            return load_image(self.name)
        file = BytesIO(self.data)
        file.name = self.name  # what errors call it
        return load_image(file)


def views_of(images: Iterable["Image.Image"], model: Step3VL) -> list[Views]:
    """Images preprocessed for the model. Raises InputError for a model without a vision tower."""
    vision = model.config.vision
    if vision is None:
        raise InputError(f"model {model.config.name} has no vision tower: it takes no images")
    return [preprocess(image, vision) for image in images]
