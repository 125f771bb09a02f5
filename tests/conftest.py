"""Setup of all tests: fixed random state, one thread, no network, and Triton's interpreter if there
is no GPU."""

import gc
import os
import random
import signal
import sys
from collections.abc import Generator

import numpy as np
import pytest
import torch

from model.text import jinja_worker
from tests.support.gpu_guard import (  # noqa: F401 - hooks
    pytest_collection_modifyitems,
    pytest_runtest_call,
    pytest_runtest_logreport,
    pytest_runtest_makereport,
    pytest_runtest_protocol,
)

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may download
os.environ["PACORE_WARM_UP"] = "0"  # tests compile only what they launch
os.environ["PACORE_ONEDNN"] = "1"  # the same forms are tested on every CPU

# Triton kernels are tested on the GPU if there is one, else in Triton's interpreter, which must be
# selected before a kernel is defined, and whose bf16 is wrong as shipped.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.support.interpreter import correct_interpreter

    correct_interpreter()

# One thread on every machine: sums are split alike, and tiny ops do not wait for other threads.
torch.set_num_threads(1)

try:
    from hypothesis import settings
except ImportError:  # a GPU node may have pytest without it
    pass
else:
    settings.load_profile("ci")  # derandomised, without deadlines and without a database

# A script's background jobs ignore Ctrl-C, and so would the commands that tests send one to.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Exclude the objects that exist now from garbage collection: each timing starts a collection,
    which would take 0.3 s."""
    gc.freeze()


@pytest.fixture(autouse=True)
def seeds():
    """Start every test from the same random state, independent of the tests before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def small_roofline() -> Generator[None]:
    """Measure the CPU's roofline with little work, since no test depends on its values."""
    from bench.measure import roofline

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(roofline.GEMM_SIZE, "cpu", 64)
        patch.setitem(roofline.COPY_CACHES, "cpu", 1)
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The CPU, and the GPU if there is one."""
    return request.param


@pytest.fixture(scope="session")
def triton_device() -> str:
    """The device of Triton kernels: the GPU (the test gets the mark `gpu`), or the CPU,
    interpreted."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def interpreter() -> None:
    """For a test whose Triton kernels take CPU tensors: skips it if kernels are compiled."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter, which is off on a machine with a GPU")


@pytest.fixture
def steady_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products whose bits do not depend on a row's index in its tile, as on a GPU.

    The interpreter uses NumPy's products, and its BLAS sums the last rows of a matrix in another
    order on CPUs without AVX-512. Summing in fp64 and rounding hides that.
    """
    if torch.cuda.is_available():
        return
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *rest):
        zeros = TensorHandle(np.zeros(d.data.shape), tl.float64)
        product = plain(self, a, b, zeros, *rest)
        return TensorHandle(product.data.astype(d.data.dtype) + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


# Two things take seconds, so only tests that `make quick` leaves out by their mark may do them:
# start a Python process (`cli`), import transformers or timm (`judge`). The process that renders
# templates is exempt: it starts once, in 50 ms.
_now: list[pytest.Item] = []


def pytest_runtest_logstart() -> None:
    _now.clear()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    _now[:] = [item]
    return (yield)


def _refuse_the_unmarked(event: str, args: tuple) -> None:
    mark = None
    if event == "subprocess.Popen" and sys.executable in (args[0], *args[1][:1]):
        mark = "cli" if args[1][-1] != jinja_worker.__file__ else None
    elif event == "import" and args[0] in ("transformers", "timm"):
        mark = "judge"
    if mark and _now and not _now[0].get_closest_marker(mark):
        pytest.fail(f"{event} {args[0]}: a test that does this needs the mark `{mark}`")


sys.addaudithook(_refuse_the_unmarked)
