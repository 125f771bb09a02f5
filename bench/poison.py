"""Errors after which a process can do no more work on its GPU. Imports no torch.

An illegal access ends a process's CUDA context: every later call fails, whatever it is. A failed
graph capture leaves PyTorch's allocator broken (`model.cuda_graph.failed_capture`). Whatever says
so is taken for such an error: a new process costs seconds, a wrong verdict much more.
"""

from kernels.errors import one_line

SIGNS = (
    "CUDA error",
    "Triton Error [CUDA]",
    "CUBLAS_STATUS",
    "CUDNN_STATUS",
    "illegal memory access",
    "device-side assert",
    "misaligned address",
    "unspecified launch failure",
    "stream is capturing",
    "during capture",
    "failed capture",
    "INTERNAL ASSERT",
)


class PoisonedError(Exception):
    """What `form` raised has spoiled this process for everything that comes after it."""

    def __init__(self, form: str, error: Exception) -> None:
        super().__init__(one_line(error))
        self.form = form


def poisons(text: str) -> bool:
    """Whether an error that says `text` spoils the process."""
    return any(sign in text for sign in SIGNS)


def check_poison(form: str, error: Exception) -> None:
    """Raise PoisonedError if what `form` raised spoils the process."""
    if poisons(str(error)):
        raise PoisonedError(form, error) from error
