"""Programmatic dependent launch (PDL, sm_90): a kernel starts while the one before it still runs.

With PDL, a kernel may access memory that an earlier kernel of the stream writes or reads only after
`wait_for_previous`, which returns once the previous kernel has ended and its writes are visible.
Memory that no kernel of a step writes, such as weights, may be loaded before. Every kernel with PDL
waits exactly once, before its first loop: Triton moves the loads of a pipelined loop above a wait
inside it (triton#11905). `release_next` comes after the wait, so that when a kernel starts, all
kernels before the previous one have ended.

Triton's interpreter runs kernels one after the other, so both helpers then do nothing.
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
    """Wait until the previous kernel of the stream has ended; does nothing without PDL."""
    if PDL and not INTERPRETED:
        gdc_wait()


@triton.jit
def release_next(PDL: tl.constexpr) -> None:
    """Let the next kernel start once all CTAs have called this or ended; nothing without PDL.

    It is safe anywhere after `wait_for_previous`, because the next kernel waits, too.
    """
    if PDL and not INTERPRETED:
        gdc_launch_dependents()


def pdl_options(config: KernelConfig, device: torch.device) -> dict[str, bool]:
    """The launch options for the switch `pdl`: the kernel's PDL and, if set, `launch_pdl`.

    Raises ImplError if `pdl` is set on a GPU older than sm_90.
    """
    if not config.get("pdl"):
        return {"PDL": False}
    arch = gpu_of(device).arch
    if arch < 90:
        raise ImplError(f"pdl=1 needs sm_90 or newer, not sm_{arch}")
    return {"PDL": True, "launch_pdl": True}
