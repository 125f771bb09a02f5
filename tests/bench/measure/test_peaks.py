"""Shares of the data sheet's peak."""

import pytest
import torch

from bench.measure import peaks
from bench.measure.peaks import PEAKS, peak_of
from bench.measure.rows import measured
from bench.measure.timing import Timing
from bench.measure.verdicts import Verdict

H200 = PEAKS["NVIDIA H200"]
RIGHT = Verdict(0.0, 0.0, None)


def row(device="cpu", dtype=torch.bfloat16, **work):
    timing = Timing(90.0, 100.0, 110.0, 7, "graph")
    return measured(
        *("op", "case", "triton"),
        device=torch.device(device),
        dtype=dtype,
        verdict=RIGHT,
        timing=timing,
        **work,
    )


def test_units():
    """Guards against a factor of a thousand: a millisecond of the whole bandwidth is 4.8 GB."""
    mfu, mbu = H200.utilisation(1000, 4_800_000_000, 989_000_000_000 // 2, torch.bfloat16)
    assert (mfu, mbu) == (pytest.approx(0.5), pytest.approx(1.0))
    mfu, _ = H200.utilisation(1000, 0, 67_000_000_000, torch.float32)
    assert mfu == pytest.approx(1.0)


def test_rows_of_a_known_gpu(monkeypatch):
    """Guards the fields: the larger share counts, at the median; the measured ceilings stay."""
    monkeypatch.setattr("bench.measure.rows.peak_of", lambda device: H200)
    memory = row(num_bytes=240_000_000, flops=1)
    assert memory["peak_fraction"] == memory["mbu"] == pytest.approx(0.5)
    products = row(num_bytes=1, flops=24_725_000_000)
    assert products["peak_fraction"] == products["mfu"] == pytest.approx(0.25)
    assert products["roofline_pct"] > 0


def test_rows_of_other_devices():
    """Guards rows of CPUs and of unknown GPUs against a share of somebody else's peak."""
    assert not {"mfu", "mbu", "peak_fraction"} & row(num_bytes=1, flops=1).keys()


def test_names_are_those_that_torch_returns(monkeypatch):
    """Guards against a GPU that is not found, or another one of the same family."""
    device = torch.device("cuda")
    for name, rate in (("NVIDIA H100 PCIe", 2000.0), ("NVIDIA H100 80GB HBM3", 3350.0)):
        monkeypatch.setattr(peaks.torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_of(device).memory_gb_s == rate
    monkeypatch.setattr(peaks.torch.cuda, "get_device_name", lambda _: "NVIDIA L4")
    assert peak_of(device) is None
