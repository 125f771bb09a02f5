"""Images of problems on their way into a model: encoded, then as its views."""

from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

from model.config import VisionConfig
from model.errors import InputError
from model.vision.image import Views, load_image, preprocess

if TYPE_CHECKING:
    from PIL import Image

    from model.step3vl import Step3VL


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

    def views(self, vision: VisionConfig) -> Views:
        """Decode the image and cut it into views. Raises InputError if it is none."""
        return preprocess(self.load(), vision)


def vision_of(model: "Step3VL") -> VisionConfig:
    """The config of the model's vision tower. Raises InputError for a model without one."""
    if model.config.vision is None:
        raise InputError(f"model {model.config.name} has no vision tower: it takes no images")
    return model.config.vision
