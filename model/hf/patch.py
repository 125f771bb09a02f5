"""`patch(model)`: a model of transformers or timm computes with our ops; `unpatch` undoes it.

A patched module keeps its class, its weights and its place. Only a method, mostly `forward`, is
replaced by an attribute of the instance, so that checkpoints, the module's hooks and deepcopy work
as before. Modules whose weights a fused op reads, such as a layer's second norm, are not called.
"""

from collections.abc import Iterable, Iterator
from types import MethodType

from torch import nn

import kernels.torch_ops  # noqa: F401 - registers the ops for torch.compile
from kernels.runtime.dispatch import IMPLS, check
from model.hf import step3p7, text, timm_pe
from model.hf.parts import BUFFER, Family, Part

FAMILIES: dict[str, Family] = {
    family.module: family for family in (*text.FAMILIES, *step3p7.FAMILIES, *timm_pe.FAMILIES)
}
METHODS = {part.method for family in FAMILIES.values() for part in family.parts.values()}
LIBRARIES = ("transformers.models.", "timm.")


def patch(
    model: nn.Module, ops: Iterable[str] | None = None, impl: str | None = None
) -> dict[str, int]:
    """Let the modules of `model` that we know compute with our ops; returns modules per op.

    ops: the ops to use, by default all that apply
    impl: of these ops, "eager", "portable" or "triton"; None takes Triton on CUDA, else portable

    What was patched before stays so; `unpatch` first to use other ops only.
    The ops have no backward: call the model under torch.no_grad() or torch.inference_mode().
    Raises ValueError, and patches nothing, if the model contains a module of its library that is
    not known, a known one with a setting that is not supported, or none for one of `ops`.
    """
    if impl not in (None, *IMPLS):
        raise ValueError(f"patch: impl must be one of {', '.join(IMPLS)}, not {impl!r}")
    parts = list(_parts(model))
    known = sorted({part.op for _, _, part in parts})
    if not known:
        raise ValueError(f"patch: {type(model).__name__} has no module that we know")
    chosen = set(known if ops is None else ops)
    for op in sorted(chosen - set(known)):
        where = type(model).__name__
        raise ValueError(
            f"patch: {op!r} applies nowhere in {where}; choose from {', '.join(known)}"
        )
    counts = dict.fromkeys(sorted(chosen), 0)
    to_patch = [(name, module, part) for name, module, part in parts if part.op in chosen]
    for name, module, part in to_patch:
        try:
            _check_own(module, part)
            part.check(module)
        except ValueError as error:
            raise ValueError(
                f"patch: {part.op} does not fit {_described(name, module)}: {error}"
            ) from None
    for _, module, part in to_patch:
        module.pacore_impl = impl  # type: ignore[assignment]
        setattr(module, part.method, MethodType(part.forward, module))
        for name, tensor in part.buffers(module).items():
            module.register_buffer(BUFFER + name, tensor, persistent=False)
        counts[part.op] += 1
    return counts


def unpatch(model: nn.Module) -> None:
    """Restore every module's own forward."""
    for module in model.modules():
        if "pacore_impl" in module.__dict__:
            buffers = [name for name in module._buffers if name.startswith(BUFFER)]
            for name in ("pacore_impl", *buffers, *(METHODS & module.__dict__.keys())):
                delattr(module, name)


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module, Part]]:
    """The modules that can be patched, by name. Raises ValueError for one that is not known."""
    for name, module in model.named_modules():
        source = type(module).__module__
        if not source.startswith(LIBRARIES):
            known = [base.__name__ for base in type(module).__mro__ if _part_of(base)]
            if known:
                raise ValueError(
                    f"patch: {_described(name, module)} is a subclass of {known[0]}, which may"
                    " compute something else"
                )
            continue
        family = FAMILIES.get(source, Family(source, {}))
        if (part := _part_of(type(module))) is not None:
            yield name, module, part
        elif type(module).__name__ not in family.others:
            raise ValueError(
                f"patch: {_described(name, module)} is not known; patch the part of the model that"
                " is, or see docs/transformers.md for what is"
            )
        for attribute, child in module.named_children():
            if inner := family.parts.get(f"{type(module).__name__}.{attribute}"):
                yield f"{name}.{attribute}".lstrip("."), child, inner


def _part_of(kind: type) -> Part | None:
    family = FAMILIES.get(kind.__module__)
    return family.parts.get(kind.__name__) if family else None


def _check_own(module: nn.Module, part: Part) -> None:
    present = module.__dict__.get(part.method)
    own = present is None or getattr(present, "__func__", None) is part.forward
    check(own, f"its {part.method} was replaced already, as accelerate's hooks do")


def _described(name: str, module: nn.Module) -> str:
    return f"{type(module).__name__} ({name})" if name else type(module).__name__
