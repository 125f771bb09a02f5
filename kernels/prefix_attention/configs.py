"""How prefix attention cuts its work: tile choices by class of inputs, and what to tune among.

block       tokens of K and V at a time, of one page
num_warps, num_stages
programs    persistent programs per SM
grain       tokens that a stretch is cut by; of the batch-invariant mode, of a chunk
overhead    of starting on a tile, in grains
tma         1: whole blocks by tensor copies (sm_90), if grain is a multiple of block
ahead       1: the page of the next block waits in a register; 0: each block looks up its own, and
            the look-up takes a stage of the pipeline
pieces      1: the schedule writes a record of each program's every piece; 0: programs walk the line
split       1: with pieces, tiles of the smaller size have a line and a launch of their own, with as
            many programs as they have alone
steady      1: blocks that all rows see whole have a loop of their own, without masks
pdl         1: attention and merge start while the kernel before them ends (runtime/pdl.py, sm_90)
fp16        of e4m3. 1: products in fp16, which holds e4m3 exactly; 0: in q's dtype
"""

from dataclasses import dataclass, replace

import torch

from kernels.prefix_plan import PrefixPlan
from kernels.runtime.configs import Gpu, KernelConfig, Tunable

LEAST_M = 16  # of a tensor-core product
WGMMA_M = 64  # of a warpgroup's: 16 rollouts of 4 query heads fill it
LARGEST_M = 128
WIDEST_DIM = 256  # head_dim for whose sums registers are short


@dataclass(frozen=True)
class InputClass:
    """A class of inputs with tile choices of its own."""

    dim: int
    large: int  # M of the larger row tiles, 0 for none
    small: int
    fp8: bool = False
    invariant: bool = False
    fused: bool = False

    @staticmethod
    def of(
        plan: PrefixPlan, group: int, dim: int, *, fp8: bool, invariant: bool, fused: bool
    ) -> "InputClass":
        """The class of a plan, `group` query heads to a KV head.

        By the query vectors (rows times group) of the nodes with the fewest and the most rows,
        M of the larger + the smaller tiles:

            fewest    most         head_dim < 256    head_dim 256
            <= 16     <= 16            0 + 16           0 + 16
            <= 16     17 to 64        64 + 16          64 + 0
            <= 16     > 64           128 + 16          64 + 0
            > 16      <= 64           64 + 0           64 + 0
            > 16      > 64           128 + 0           64 + 0

        More than 16 query heads to a KV head have no smaller tiles, and more than 64 have 128. A
        size that the plan has no use for is not compiled in. 128 vectors of head_dim 256 and their
        fp32 sums do not fit the registers, nor do two sizes. The batch-invariant mode has one size,
        64 if the group fits, whatever is in the batch.
        """
        largest = LARGEST_M if dim < WIDEST_DIM else WGMMA_M
        if invariant:
            return InputClass(
                dim, WGMMA_M if group <= WGMMA_M else largest, 0, fp8, invariant, fused
            )
        least, most = (group * rows for rows in plan.row_counts)
        both = dim < WIDEST_DIM or most <= LEAST_M
        small = LEAST_M if both and group <= LEAST_M and 0 < least <= LEAST_M else 0
        large = WGMMA_M if max(most, group) <= WGMMA_M else largest
        return InputClass(
            dim, 0 if small and most <= LEAST_M else large, small, fp8, invariant, fused
        )

    @property
    def key(self) -> str:
        """Its name in the tables, as in "D128 M64+16 fp8"."""
        names = [name for name in ("fp8", "invariant", "fused") if getattr(self, name)]
        return " ".join([f"D{self.dim}", f"M{self.large}+{self.small}", *names])

    @staticmethod
    def from_key(key: str) -> "InputClass":
        """The class that `key` names."""
        dim, sizes, *names = key.split()
        large, small = map(int, sizes[1:].split("+"))
        return InputClass(int(dim[1:]), large, small, **dict.fromkeys(names, True))

    def choose(self, device: torch.device) -> KernelConfig:
        """Its tile choices, from the GPU's table or by rule."""
        return TUNABLE.choose(self.key, device, self)

    def choose_small(self, device: torch.device) -> KernelConfig:
        """Those of the smaller tiles' own launch, as of a class that has no others.

        What is tried out for this class is not meant for them.
        """
        small = replace(self, large=0)
        return TUNABLE.choose(small.key, device, small, overridden=False)

    def rule(self, gpu: Gpu) -> KernelConfig:
        """Choices without measurements: as much in flight as fits, and no register spilled.

        Blocks of 64 tokens, 4 warps, 3 stages, with `ahead` and `pieces`, without `steady`, but:

            choice      value  where                                  why
            block       32     head_dim 256 on sm_80 or with e4m3;    64 tokens would spill
                               M 128 with e4m3 on sm_80
            num_warps   8      M 128, head_dim 256; e4m3 or fused     one program per SM needs them
                               on sm_80
            num_stages  5      blocks of 32, M 128                    keeps as much in flight
                        2      head_dim 256 in blocks of 64           shared memory
                        <= 4   `ahead` with e4m3 or head_dim 256      it costs a buffer
            programs    1      8 warps
                        2      larger tiles, or sm_80                 that are resident
                        3      smaller tiles alone, on sm_90
            ahead       0      fused e4m3; fused M 128 on sm_80       registers
                               M 64 by 4 warps on sm_80               room for a second program
            pieces      0      fused smaller tiles alone, on sm_90    registers
            steady      1      M 128, but e4m3                        fills the pipeline twice: pays
                                                                      where computing takes longer

        `python -m profiles static` shows what the compiler makes of it.
        """
        old, widest, largest = gpu.arch < 90, self.dim == WIDEST_DIM, self.large == LARGEST_M
        half = (old or self.fp8) if widest else old and largest and self.fp8
        warps = 8 if widest or largest or (old and (self.fp8 or self.fused)) else 4
        ahead = not (self.fused and (self.fp8 or (old and largest)))
        ahead = ahead and not (old and self.large == WGMMA_M and warps == 4)
        lean = self.fused and not (self.large or self.fp8 or old)
        stages = 5 if half or largest else 2 if widest else 3
        if ahead and (self.fp8 or widest):
            stages = min(stages, 4)
        return {
            "block": 32 if half else 64,
            "num_warps": warps,
            "num_stages": stages,
            "programs": 1 if warps == 8 else 2 if self.large or old else 3,  # that are resident
            "grain": 256 if self.invariant else 16,
            "overhead": 0 if self.invariant else 2,
            "tma": 0,
            "ahead": int(ahead),
            "pieces": int(not lean),
            "split": 0,
            "pdl": 0,
            "steady": int(largest and not self.fp8),
            **({"fp16": 0} if self.fp8 else {}),
        }

    def fuses(self) -> bool:
        """Whether a decode step takes the fused form, by rule: where that fits the registers."""
        return not self.fp8 or (self.dim < WIDEST_DIM and self.large < LARGEST_M)


def _candidates(key: str, gpu: Gpu) -> list[KernelConfig]:
    """The rule, then its kin."""
    kind = InputClass.from_key(key)
    rule = kind.rule(gpu)
    kin = [{"programs": n} for n in (1, 2, 3, 4)]
    tight = kind.fused and (kind.fp8 or not kind.large)  # more, or fewer stages, would spill
    spills = kind.invariant and kind.fp8
    kin += (
        []
        if tight
        else [{"num_stages": n} for n in ((3,) if kind.dim == WIDEST_DIM or spills else (3, 5))]
    )
    if kind.invariant:
        kin += [{"grain": n} for n in (128, 512)]
    else:
        kin += [{"grain": 64}, {"overhead": 0}, {"overhead": 6}]
    # What the fused form has no registers for stays off.
    off = {name for name in ("ahead", "pieces") if kind.fused and not rule[name]}
    if kind.fused and kind.fp8:
        off = {"ahead", "steady"} if gpu.arch >= 90 else set()
    kin += [{name: 1 - rule[name]} for name in ("ahead", "steady", "pieces") if name not in off]
    kin += [{"split": 1}] if kind.large and kind.small and not kind.fused else []
    if kind.fp8:  # with more in flight it spills, on sm_90; fused, with four warps in any case
        kin += [
            {"fp16": 1, "num_warps": 8, "programs": 1} if kind.fused else {"fp16": 1, "ahead": 0}
        ]
    kin += [{"pdl": 1}] if gpu.arch >= 90 else []
    if gpu.arch >= 90 and not tight and not spills:
        kin += [{"tma": 1, "grain": max(64, rule["grain"])}]
    candidates = [rule, *(rule | change for change in kin)]
    return [one for at, one in enumerate(candidates) if one not in candidates[:at]]


TUNABLE = Tunable("prefix_attention", lambda gpu, kind: kind.rule(gpu), _candidates)
