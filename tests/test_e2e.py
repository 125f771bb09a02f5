"""The end-to-end job on the tiny model: its rows, and that a wrong form cannot pass."""

import pytest
import torch

from bench import e2e
from kernels import prefix_attention
from model.step3vl import Step3VL


@pytest.fixture(scope="module")
def tiny() -> Step3VL:
    return Step3VL.from_preset("tiny", seed=1)


def test_question(tiny: Step3VL, monkeypatch: pytest.MonkeyPatch):
    """Both forms do the same work, and the rates follow from it."""
    monkeypatch.setattr(e2e, "PROMPT_TOKENS", 200)
    rows = e2e.ask(tiny, widths=(4,), max_tokens=6)
    assert [row["impl"] for row in rows] == ["eager", "default"]
    for row in rows:
        assert row["failure"] is None
        assert row["max_err"] < 1e-4
        tokens = row["tokens_per_second"] * row["median_us"] / 1e6
        assert tokens == pytest.approx(round(tokens), rel=1e-6)
        assert 6 < round(tokens) <= 30  # 4 rollouts and the synthesis, 6 tokens each at most
        assert row["decode_tokens_per_second"] > 0
    assert rows[0]["bytes"] == rows[1]["bytes"] > 0
    assert rows[1]["speedup"] == pytest.approx(rows[0]["median_us"] / rows[1]["median_us"])


def test_rate():
    """The first step's tokens took the time before it: they do not count."""
    assert e2e._rate([(10.0, 4), (11.0, 4), (12.0, 2)]) == 3.0
    assert e2e._rate([(10.0, 4)]) is None


def test_photo(tiny: Step3VL, monkeypatch: pytest.MonkeyPatch):
    """A photo of 1280 x 720: six crops and a global view through both forms."""
    monkeypatch.setattr(e2e, "measure", lambda calls, **_: dict.fromkeys(calls, TIMING))
    rows = e2e.look(tiny)
    assert [row["case"] for row in rows] == ["tiny 6 crops, 98 tokens"] * 2
    assert [row["failure"] for row in rows] == [None, None]
    assert 0 < rows[1]["max_err"] < 1e-4


def test_a_wrong_form_fails(tiny: Step3VL, monkeypatch: pytest.MonkeyPatch):
    """An attention with a wrong scale gives other rollouts and other logits: both rows fail."""
    right = prefix_attention.prefix_attention_portable

    def wrong(q, k, v, plan, scale, **options):
        return right(q, k, v, plan, 1.01 * scale, **options)

    monkeypatch.setattr(prefix_attention, "prefix_attention_portable", wrong)
    monkeypatch.setattr(e2e, "PROMPT_TOKENS", 200)
    monkeypatch.setattr(e2e, "measure", lambda calls, **_: dict.fromkeys(calls, TIMING))
    for rows in (e2e.ask(tiny, widths=(4,), max_tokens=6), e2e.look(tiny)):
        assert rows[0]["failure"] is None
        assert rows[1]["failure"]


def test_vision_flops(tiny: Step3VL):
    """The formula against PyTorch's own count of products."""
    from torch.utils.flop_counter import FlopCounterMode

    from model.image import preprocess

    views = preprocess(e2e._photo(), tiny.config.vision)
    eager = Step3VL.from_preset("tiny", seed=1, impl="eager")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        eager.encode_images([views])
    patches = sum(v.shape[-1] // 14 * (v.shape[-1] // 14) for v in (*views.crops, views.image))
    embedding = 2 * patches * 3 * 14 * 14 * tiny.config.vision.width
    assert e2e._image_flops(tiny.config, views) == counter.get_total_flops() - embedding


TIMING = e2e.Timing(1.0, 1.0, 1.0, 1, "clock")
