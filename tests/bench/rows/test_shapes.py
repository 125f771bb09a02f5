"""Shapes of rows: the field of new rows, the names of recorded ones."""

import pytest

from bench.rows.shapes import shape_of
from bench.suite import cases

GRIDS = [case for kind in ("cpu", "cuda") for case in cases(kind, grid=True)]


@pytest.mark.parametrize(
    "case",
    [case for case in GRIDS if case.op == "prefix_attention" and shape_of({"case": case.name})],
    ids=lambda case: case.name,
)
def test_names_of_recorded_rows_are_read_like_shapes(case):
    """Guards heat maps and decisions over old and new rows together: a recorded row without the
    field says the same as a new one."""
    known = shape_of({"case": case.name})
    assert "model" not in known and known["batch"] * known["prefix"] > 0
    now = shape_of({"case": case.name, "shape": case.shape})
    assert known.items() <= now.items()
    assert {name for name in ("window", "fp8") if now.get(name)} <= known.keys()


def test_decode_steps():
    """Guards the GPU tables: the model is part of a step's name."""
    row = {"case": "step3-vl-10b B16 P2048 S512"}
    assert shape_of(row) == {"model": "step3-vl-10b", "batch": 16, "prefix": 2048, "suffix": 512}


@pytest.mark.parametrize("case", ["T16 C4096", "prefill 2048", "4 x (B4 P512 S64)", "", None])
def test_other_names_have_no_shape(case):
    """Guards against sizes read from a name that means something else."""
    assert shape_of({"case": case}) == {}
