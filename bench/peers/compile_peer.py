"""torch.compile of an op's definition: what a PyTorch user has without writing a kernel.

It is compiled before the timed call, again for every shape, without dynamic sizes.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from bench.peers.peer import TORCH, Call, Library, Unavailable


def compiled(op: Callable, inputs: dict) -> Call:
    """The eager form of `op`, compiled for `inputs` as one graph."""
    check(next(x.device for x in inputs.values() if isinstance(x, torch.Tensor)))
    run = torch.compile(partial(op, impl="eager"), fullgraph=True, dynamic=False)
    with for_every_shape():
        run(**inputs)
    return partial(run, **inputs)


@contextmanager
def for_every_shape() -> Iterator[None]:
    """Lets dynamo compile every shape; after a few it would silently run the uncompiled form."""
    from torch._dynamo import config  # late: it imports half of torch's compiler

    with config.patch(recompile_limit=1024, fail_on_recompile_limit_hit=True):
        yield


def check(device: torch.device) -> None:
    """Raises Unavailable on a CPU without a C++ compiler."""
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and not shutil.which(compiler):
        raise Unavailable(f"needs a C++ compiler ({compiler} was not found)")


COMPILE = Library("torch.compile", "a C++ compiler", TORCH.version, check)
