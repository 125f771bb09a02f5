"""Errors after which a process can no longer use its GPU. Imports no torch.

An illegal access ends a process's CUDA context: every later call fails. A failed graph capture
leaves PyTorch's allocator broken (`model.cuda_graph.failed_capture`). Every message with one of
SIGNS counts as such an error: a new process costs seconds, a wrong verdict much more.
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
    """An error in `form` has made this process unusable for everything that follows."""

    def __init__(self, form: str, error: Exception) -> None:
        super().__init__(one_line(error))
        self.form = form


def poisons(text: str) -> bool:
    """Whether an error with the message `text` poisons the process."""
    return any(sign in text for sign in SIGNS)


def check_poison(form: str, error: Exception) -> None:
    """Raise PoisonedError if `error`, raised by `form`, poisons the process."""
    if poisons(str(error)):
        raise PoisonedError(form, error) from error
