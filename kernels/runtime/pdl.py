"""Programmatic dependent launch (PDL, sm_90): a kernel starts while the one before it still runs.

Launched that way, a kernel may touch memory that an earlier kernel of the stream writes or reads
only after `wait_for_previous`, which returns once the previous kernel has ended and its writes can
be seen. What no kernel of a step writes, such as weights, may be loaded before. Every kernel with
PDL waits, exactly once, before its first loop: Triton moves the loads of a pipelined loop above a
wait inside it (triton#11905). `release_next` comes after the wait, so that all kernels before the
previous one have ended, too, when a kernel starts.

Triton's interpreter runs kernels one after the other: both helpers then do nothing.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.errors import ImplError
from kernels.runtime.configs import KernelConfig, gpu_of

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def wait_for_previous(PDL: tl.constexpr) -> None:
    """Block until the previous kernel of the stream has ended. Nothing without PDL."""
    if PDL and not INTERPRETED:
        gdc_wait()


@triton.jit
def release_next(PDL: tl.constexpr) -> None:
    """Let the next kernel start once all programs have come here or ended. Nothing without PDL.

    The next kernel's own wait makes this safe at any point after ours.
    """
    if PDL and not INTERPRETED:
        gdc_launch_dependents()


def pdl_options(chosen: KernelConfig, device: torch.device) -> dict[str, bool]:
    """What a launch gets for the tile choice `pdl`: the kernel's PDL and, if set, `launch_pdl`.

    Raises ImplError where `pdl` is chosen for a GPU older than sm_90.
    """
    if not chosen.get("pdl"):
        return {"PDL": False}
    arch = gpu_of(device).arch
    if arch < 90:
        raise ImplError(f"pdl=1 needs sm_90 or newer, not sm_{arch}")
    return {"PDL": True, "launch_pdl": True}
