"""Kernel configs of prefix attention: input classes, the rule, and candidates for tuning.

block       tokens of a KV block, within one page
num_warps, num_stages
programs    persistent CTAs per SM
grain       tokens of a grain of the work line; in the batch-invariant mode, of a chunk
overhead    cost of starting a row tile, in grains
tma         1: whole blocks by tensor copies (sm_90), if grain is a multiple of block
ahead       1: the page of the next block is kept in a register; 0: each block looks up its own, and
            the look-up takes a pipeline stage
pieces      1: the schedule writes a record of every piece; 0: CTAs derive them from the work line
split       1: with pieces, tiles of the smaller size have their own work line and launch, with the
            kernel config that they have without larger tiles
steady      1: blocks that all rows see whole have a separate loop without masks
pdl         1: attention and merge start while the kernel before them ends (runtime/pdl.py, sm_90)
fp16        with e4m3 only. 1: products in fp16, which holds e4m3 exactly; 0: in q's dtype
"""

from dataclasses import dataclass, replace

import torch

from kernels.prefix_plan import PrefixPlan
from kernels.runtime.configs import Gpu, KernelConfig, Tunable

MIN_M = 16  # the least M of a tensor-core product
WGMMA_M = 64  # M of a warpgroup product: 16 rollouts of 4 query heads fill it
MAX_M = 128
MAX_DIM = 256  # the head_dim whose sums nearly fill the registers


@dataclass(frozen=True)
class InputClass:
    """Inputs that share one kernel config."""

    dim: int  # head_dim
    large: int  # M of the larger row tiles, 0 for none
    small: int  # M of the smaller row tiles, 0 for none
    fp8: bool = False  # FP8 KV
    invariant: bool = False  # batch-invariant mode
    fused: bool = False  # fused decode, see rotary_attention.py

    @staticmethod
    def of(
        plan: PrefixPlan, group: int, dim: int, *, fp8: bool, invariant: bool, fused: bool
    ) -> "InputClass":
        """The class of a plan with `group` query heads per KV head.

        M of the larger + M of the smaller tiles, by the query vectors (rows times group) of the
        nodes with the fewest and the most rows:

            fewest    most         head_dim < 256    head_dim 256
            <= 16     <= 16            0 + 16           0 + 16
            <= 16     17 to 64        64 + 16          64 + 0
            <= 16     > 64           128 + 16          64 + 0
            > 16      <= 64           64 + 0           64 + 0
            > 16      > 64           128 + 0           64 + 0

        With more than 16 query heads per KV head there are no smaller tiles; with more than 64 the
        larger have 128. A size that the plan does not use is not compiled in. At head_dim 256
        neither 128 vectors with their fp32 sums nor two sizes fit in the registers. The
        batch-invariant mode has one size for every batch: 64 if the group fits.
        """
        largest = MAX_M if dim < MAX_DIM else WGMMA_M
        if invariant:
            return InputClass(
                dim, WGMMA_M if group <= WGMMA_M else largest, 0, fp8, invariant, fused
            )
        min_vectors, max_vectors = (group * rows for rows in plan.row_counts)
        both = dim < MAX_DIM or max_vectors <= MIN_M
        small = MIN_M if both and group <= MIN_M and 0 < min_vectors <= MIN_M else 0
        large = WGMMA_M if max(max_vectors, group) <= WGMMA_M else largest
        return InputClass(
            dim, 0 if small and max_vectors <= MIN_M else large, small, fp8, invariant, fused
        )

    @property
    def key(self) -> str:
        """The class's name in tuned tables, as in "D128 M64+16 fp8"."""
        names = [name for name in ("fp8", "invariant", "fused") if getattr(self, name)]
        return " ".join([f"D{self.dim}", f"M{self.large}+{self.small}", *names])

    @staticmethod
    def from_key(key: str) -> "InputClass":
        """The class that `key` names."""
        dim, sizes, *names = key.split()
        large, small = map(int, sizes[1:].split("+"))
        return InputClass(int(dim[1:]), large, small, **dict.fromkeys(names, True))

    def choose(self, device: torch.device) -> KernelConfig:
        """The class's kernel config, from the GPU's tuned table or by the rule."""
        return TUNABLE.choose(self.key, device, self)

    def choose_small(self, device: torch.device) -> KernelConfig:
        """The kernel config for a separate launch of the smaller tiles (`split`).

        It is that of the class with the smaller tiles only, and `use_config` does not change it.
        """
        small = replace(self, large=0)
        return TUNABLE.choose(small.key, device, small, overridden=False)

    def rule(self, gpu: Gpu) -> KernelConfig:
        """The config without measurements: as much in flight as fits, without register spills.

        Blocks of 64 tokens, 4 warps, 3 stages, with `ahead` and `pieces`, without `steady`, except:

            key         value  where                                  why
            block       32     head_dim 256 on sm_80 or with e4m3;    64 tokens would spill
                               M 128 with e4m3 on sm_80
            num_warps   8      M 128, head_dim 256; e4m3 or fused     one CTA per SM needs them
                               on sm_80
            num_stages  5      blocks of 32, M 128                    keeps as much in flight
                        2      head_dim 256 in blocks of 64           shared memory
                        <= 4   `ahead` with e4m3 or head_dim 256      `ahead` costs a buffer
            programs    1      8 warps                                as many as are resident
                        2      larger tiles, or sm_80
                        3      smaller tiles alone, on sm_90
            ahead       0      fused e4m3; fused M 128 on sm_80       registers
                               M 64 with 4 warps on sm_80             room for a second CTA
            pieces      0      fused smaller tiles alone, without     registers
                               e4m3, on sm_90
            steady      1      M 128 without e4m3                     fills the pipeline twice: pays
                                                                      where computing takes longer

        `python -m profiles static` shows the compiled result.
        """
        old, max_dim, max_m = gpu.arch < 90, self.dim == MAX_DIM, self.large == MAX_M
        short_blocks = (old or self.fp8) if max_dim else old and max_m and self.fp8
        warps = 8 if max_dim or max_m or (old and (self.fp8 or self.fused)) else 4
        ahead = not (self.fused and (self.fp8 or (old and max_m)))
        ahead = ahead and not (old and self.large == WGMMA_M and warps == 4)
        walks_line = self.fused and not (self.large or self.fp8 or old)
        stages = 5 if short_blocks or max_m else 2 if max_dim else 3
        if ahead and (self.fp8 or max_dim):
            stages = min(stages, 4)
        return {
            "block": 32 if short_blocks else 64,
            "num_warps": warps,
            "num_stages": stages,
            "programs": 1 if warps == 8 else 2 if self.large or old else 3,  # that are resident
            "grain": 256 if self.invariant else 16,
            "overhead": 0 if self.invariant else 2,
            "tma": 0,
            "ahead": int(ahead),
            "pieces": int(not walks_line),
            "split": 0,
            "pdl": 0,
            "steady": int(max_m and not self.fp8),
            **({"fp16": 0} if self.fp8 else {}),
        }

    def fuses(self) -> bool:
        """Whether the rule fuses a decode step: where the fused kernel fits in the registers."""
        return not self.fp8 or (self.dim < MAX_DIM and self.large < MAX_M)


def _candidates(key: str, gpu: Gpu) -> list[KernelConfig]:
    """The rule's config, then variations of it."""
    input_class = InputClass.from_key(key)
    rule = input_class.rule(gpu)
    changes = [{"programs": n} for n in (1, 2, 3, 4)]
    # With more stages, or fewer, these would spill.
    fills_registers = input_class.fused and (input_class.fp8 or not input_class.large)
    spills = input_class.invariant and input_class.fp8
    changes += (
        []
        if fills_registers
        else [{"num_stages": n} for n in ((3,) if input_class.dim == MAX_DIM or spills else (3, 5))]
    )
    if input_class.invariant:
        changes += [{"grain": n} for n in (128, 512)]
    else:
        changes += [{"grain": 64}, {"overhead": 0}, {"overhead": 6}]
    # Switches for which the fused form has no registers stay off.
    off = {name for name in ("ahead", "pieces") if input_class.fused and not rule[name]}
    if input_class.fused and input_class.fp8:
        off = {"ahead", "steady"} if gpu.arch >= 90 else set()
    changes += [{name: 1 - rule[name]} for name in ("ahead", "steady", "pieces") if name not in off]
    changes += (
        [{"split": 1}] if input_class.large and input_class.small and not input_class.fused else []
    )
    if input_class.fp8:  # spills on sm_90 with more in flight, and when fused with four warps
        changes += [
            {"fp16": 1, "num_warps": 8, "programs": 1}
            if input_class.fused
            else {"fp16": 1, "ahead": 0}
        ]
    changes += [{"pdl": 1}] if gpu.arch >= 90 else []
    if gpu.arch >= 90 and not fills_registers and not spills:
        changes += [{"tma": 1, "grain": max(64, rule["grain"])}]
    candidates = [rule, *(rule | change for change in changes)]
    return [config for i, config in enumerate(candidates) if config not in candidates[:i]]


TUNABLE = Tunable("prefix_attention", lambda gpu, input_class: input_class.rule(gpu), _candidates)
