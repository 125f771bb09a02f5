"""`python -m bench dispatch`: what it reports about calls through PyTorch's dispatcher."""

import json

import torch

from bench import __main__ as command
from bench.studies.host import dispatch


def test_rows(monkeypatch, capsys):
    """Guards the forms and their difference from the direct call, by its median."""
    monkeypatch.setattr(dispatch, "REPEATS", 3)
    monkeypatch.setattr(dispatch, "CALLS", 2)
    assert command.main(["dispatch", "--device", "cpu", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    direct = {row["case"]: row["median_us"] for row in rows if row["impl"] == "direct"}
    assert {"rms_norm", "silu_mul", "rotary_attention", "sample"} <= direct.keys()
    for row in rows:
        assert row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["over_direct_us"] == row["median_us"] - direct[row["case"]]
    assert {row["impl"] for row in rows} == {"direct", "operator", "custom_op"}


def test_forms_do_the_same():
    """Guards against forms of a case that compute different things."""
    cases = dispatch._cases(torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        for name, forms in cases.items():
            if name != "sample":  # its operator returns nothing
                results = [form() for form in forms.values()]
                for result in results[1:]:
                    torch.testing.assert_close(result, results[0], rtol=0, atol=0)
