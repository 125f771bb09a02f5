"""Stubs of the torchvision names that timm imports.

timm's models import its data loading, which needs torchvision, and torchvision has no build for
every PyTorch that the tests run on. The stubs do nothing: they exist only to be imported, and are
removed from `sys.modules` after timm's import, so that no other library mistakes them for
torchvision.
"""

import enum
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from torch import nn

_DATASETS = ("CIFAR10", "CIFAR100", "MNIST", "KMNIST", "FashionMNIST", "ImageFolder")
InterpolationMode = enum.Enum(
    "InterpolationMode", ("NEAREST", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")
)


@contextmanager
def torchvision_or_stub() -> Iterator[None]:
    """Within the context, `import torchvision` finds the installed package, or else the stubs."""
    if importlib.util.find_spec("torchvision"):
        yield
        return
    stub = _stub()
    sys.modules.update(stub)
    try:
        yield
    finally:
        for name in stub:
            del sys.modules[name]


def _stub() -> dict[str, ModuleType]:
    functional = _module("transforms.functional", InterpolationMode=InterpolationMode)
    transforms = _module("transforms", functional=functional, ToTensor=object)
    misc = _module("ops.misc", FrozenBatchNorm2d=type("FrozenBatchNorm2d", (nn.Module,), {}))
    ops = _module("ops", misc=misc)
    datasets = _module("datasets", **dict.fromkeys(_DATASETS, object))
    root = _module("", transforms=transforms, ops=ops, datasets=datasets)
    return {m.__name__: m for m in (root, transforms, functional, ops, misc, datasets)}


def _module(name: str, **members: object) -> ModuleType:
    module = ModuleType(f"torchvision.{name}".rstrip("."))
    module.__path__ = []
    vars(module).update(members)
    return module
