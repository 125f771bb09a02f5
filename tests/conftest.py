"""What holds for every test: one state of the random numbers, one thread, no network, and a GPU
only where there is one."""

import gc
import os
import random
import sys
from collections.abc import Generator

import numpy as np
import pytest
import torch

from tests.support.gpu_guard import (  # noqa: F401 - hooks
    pytest_collection_modifyitems,
    pytest_runtest_call,
    pytest_runtest_logreport,
    pytest_runtest_makereport,
    pytest_runtest_protocol,
)

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may download
os.environ["PACORE_WARM_UP"] = "0"  # tests compile what they launch, and nothing else

# Triton kernels are tested on the GPU where there is one, else in Triton's interpreter, which has
# to be chosen before a kernel is defined, and which Triton ships wrong for bf16.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.support.interpreter import correct_interpreter

    correct_interpreter()

# One thread on every machine: sums split the same way, and tiny ops do not wait for other threads.
torch.set_num_threads(1)

try:
    from hypothesis import settings
except ImportError:  # a GPU node may have pytest alone
    pass
else:
    settings.load_profile("ci")  # derandomised, without deadlines and without a database


def pytest_collection_finish() -> None:
    """Keep the garbage collector off what stays to the end: a collection, of which every timing
    makes one, takes 0.3 s otherwise."""
    gc.freeze()


@pytest.fixture(autouse=True)
def seeds():
    """Every test starts from the same random state, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def small_roofline() -> Generator[None]:
    """A CPU's ceilings from small work, once a process: no test is about how high they are."""
    from bench import roofline

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(roofline.GEMM_SIZE, "cpu", 64)
        patch.setitem(roofline.COPY_CACHES, "cpu", 1)
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The CPU, and a GPU where there is one."""
    return request.param


@pytest.fixture(scope="session")
def triton_device() -> str:
    """Where Triton kernels run: on the GPU, which marks the test `gpu`, or interpreted."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def interpreter() -> None:
    """For a test whose Triton kernels take the tensors of a CPU: skips where they are compiled."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter, which is off where there is a GPU")


@pytest.fixture
def steady_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products whose bits do not depend on where a row stands in its tile, as on a GPU.

    The interpreter's are NumPy's, and its BLAS sums the last rows of a matrix in another order on
    CPUs without AVX-512. Summed in fp64 and rounded, that is not seen.
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


# What takes seconds is left out of `make quick` by its mark, and no other test may do it: start a
# Python process (`cli`), import transformers or timm (`judge`).
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
        mark = "cli"
    elif event == "import" and args[0] in ("transformers", "timm"):
        mark = "judge"
    if mark and _now and not _now[0].get_closest_marker(mark):
        pytest.fail(f"{event} {args[0]}: such a test needs the mark `{mark}`")


sys.addaudithook(_refuse_the_unmarked)
