"""The rotation in a published config.json: its base, and its scaling for long contexts."""

from typing import Any

from model.errors import InputError, shown
from model.rope import Linear, RopeScaling, parse_rope_scaling
from model.weights.config_checks import check_number

KEYS = ("rope_scaling", "rope_parameters")  # transformers' name before version 5, and since
_ORIGINAL = "original_max_position_embeddings"


def read_theta(text: dict, where: str) -> Any:  # noqa: ANN401
    """The base of the rotation: a key, or an entry of one of two objects."""
    default = text.get("rope_theta", 10000.0)  # transformers' default; old Llamas omit the key
    thetas = [] if text.get("rope_theta") is None else [default]
    for key in KEYS:
        if rope := text.get(key):
            if not isinstance(rope, dict):
                raise InputError(f"{where}{key} {shown(rope)} is not implemented")
            thetas.append(rope.get("rope_theta", default))
    _require_same(thetas, f"{where}rope_theta")
    return thetas[0] if thetas else default


def read_scaling(text: dict, where: str, context: int) -> RopeScaling | None:
    """The scaling, with lengths that default to max_position_embeddings, `context`."""
    outside = text.get(_ORIGINAL)  # transformers prefers it
    if outside is not None:
        check_number(f"{where}{_ORIGINAL}", outside, int, "max_positions")
    scalings = []
    for key in KEYS:
        if rope := text.get(key):
            inside = {k: v for k, v in rope.items() if k != "rope_theta"}
            length = context if outside is None else outside
            scaling = parse_rope_scaling(inside, length, f"{where}{key}.")
            scalings.append(scaling)
            if outside is not None and scaling is not None and not isinstance(scaling, Linear):
                lengths = [outside, scaling.original_max_position_embeddings]
                _require_same(lengths, f"{where}{_ORIGINAL}")
    _require_same(scalings, f"{where}{KEYS[0]}")
    return scalings[0] if scalings else None


def _require_same(values: list, name: str) -> None:
    for value in values[1:]:  # readers differ in which one they follow
        if value != values[0]:
            raise InputError(
                f"{name} is {shown(values[0])} in one place and {shown(value)} in another; they"
                " must agree"
            )
