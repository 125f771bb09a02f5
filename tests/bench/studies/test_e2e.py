"""The end-to-end runs on the tiny model: their rows, and that a wrong form fails."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from bench.inputs import views as vision
from bench.rows import run_tables, show
from bench.studies import e2e, images
from kernels.patchify import row_width
from kernels.prefix_attention import op as prefix_attention
from kernels.runtime.grids import tokens_of
from kernels.vision_attention import op as vision_attention
from model.config import VisionConfig
from model.kv_cache import PAGE_SIZE
from model.step3vl import Step3VL
from model.vision.graph import Graphs
from model.vision.image import Views
from model.vision.tower import VisionTower


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
        seconds, running, kv = row["timeline"].values()
        assert seconds == sorted(seconds)
        assert max(running) == 4, "the four rollouts of the first round"
        assert running[-1] == 0
        assert max(kv) % PAGE_SIZE == 0
        assert max(kv) >= 200, "the prompt, at least"
    assert rows[0]["bytes"] == rows[1]["bytes"] > 0
    assert rows[1]["speedup"] == pytest.approx(rows[0]["median_us"] / rows[1]["median_us"])


def test_timeline_is_thinned(tiny: Step3VL, monkeypatch: pytest.MonkeyPatch):
    """Guards against rows with a point for each of thousands of steps, and against losing the last
    one."""
    monkeypatch.setattr(e2e, "PROMPT_TOKENS", 200)
    monkeypatch.setattr(e2e, "TIMELINE", 4)
    line = e2e.ask(tiny, widths=(2,), max_tokens=6)[1]["timeline"]
    assert 2 <= len(line["seconds"]) <= 4
    assert line["running"][-1] == 0


def test_rate():
    """The first step's tokens took the time before it, so they do not count."""
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

    def wrong(q, pages, plan, scale, **options):
        return right(q, pages, plan, 1.01 * scale, **options)

    monkeypatch.setattr(prefix_attention, "prefix_attention_portable", wrong)
    monkeypatch.setattr(e2e, "PROMPT_TOKENS", 200)
    monkeypatch.setattr(e2e, "measure", lambda calls, **_: dict.fromkeys(calls, TIMING))
    for rows in (e2e.ask(tiny, widths=(4,), max_tokens=6), e2e.look(tiny)):
        assert rows[0]["failure"] is None
        assert rows[1]["failure"]


def test_the_photo_is_encoded_every_time(tiny: Step3VL, monkeypatch: pytest.MonkeyPatch):
    """Guards against timing the image cache, and against checking one form with another's cached
    result."""
    calls, encode = [], tiny.vision.encode
    monkeypatch.setattr(tiny.vision, "encode", lambda *a, **o: calls.append(1) or encode(*a, **o))

    def thrice(forms: dict, **_: object) -> dict:
        return {name: [call(0) for _ in range(3)] and TIMING for name, call in forms.items()}

    monkeypatch.setattr(e2e, "measure", thrice)
    tiny.vision.cache.budget = 2**20
    e2e.look(tiny)
    assert len(calls) == 1 + 2 + 2 * 3  # expected, errors, times


def test_images(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """A row per size and form: its views and tokens, and rates that follow from its time."""
    monkeypatch.setattr(images, "SIZES", ((100, 100), (1280, 720)))
    monkeypatch.setattr(images, "measure", lambda calls, **_: dict.fromkeys(calls, TIMING))

    def no_graph(graphs: Graphs, *_: object) -> None:
        assert graphs.enabled is False, "the timer captures, and nothing else"

    monkeypatch.setattr(Graphs, "find", no_graph)
    tower = images.random_tower(images.PRESETS["tiny"], CPU)
    rows = [
        row for size in images.SIZES for row in images.encode(tower, images.PRESETS["tiny"], size)
    ]
    assert [(row["case"], row["impl"]) for row in rows] == [
        (f"tiny {size}", form) for size in ("100 x 100", "1280 x 720") for form in e2e.FORMS
    ]
    assert [(row["views"], row["tokens"]) for row in rows[::2]] == [(1, 9), (7, 33)]
    for row in rows:
        assert row["failure"] is None
        assert row["tflop_s"] == pytest.approx(row["flops"] / 1e6)  # of one microsecond
        assert row["gemm_pct"] == pytest.approx(100 * row["tflop_s"] / row["gemm_tflop_s"])
    assert 0 < rows[3]["max_err"] < 1e-4
    show.whole_runs(rows)
    assert "1280 x 720" in capsys.readouterr().out


def test_images_of_many_requests(monkeypatch: pytest.MonkeyPatch):
    """Other work in one form than in the other, or embeddings that depend on what they are packed
    with."""
    times = {images.ALONE: replace(TIMING, median_us=6 * TIMING.median_us), images.PACKED: TIMING}
    monkeypatch.setattr(images, "measure", lambda calls, **_: times)
    monkeypatch.setattr(images, "LOAD_REQUESTS", 3)
    config = images.PRESETS["tiny"]
    tower = images.random_tower(config, CPU)
    sizes, forward = [], type(tower).forward

    def noted(tower: VisionTower, views: list[torch.Tensor]) -> torch.Tensor:
        sizes.append(len(views))
        return forward(tower, views)

    monkeypatch.setattr(type(tower), "forward", noted)
    alone, packed = images.load(tower, config)
    assert sizes == [3 * 14] + 3 * [14]  # 2 images of 7 views per request
    assert (alone["impl"], packed["impl"]) == (images.ALONE, images.PACKED)
    assert alone["failure"] is packed["failure"] is None
    assert alone["flops"] == packed["flops"]
    assert (alone["packing_gain"], packed["packing_gain"]) == (1, 6)
    assert packed["images_per_second"] == pytest.approx(6e6 / TIMING.median_us)
    monkeypatch.setattr(type(tower), "forward", lambda t, v: forward(t, v) * (1 + len(v) / 1000))
    assert "exceeds" in images.load(tower, config)[1]["failure"]


def test_images_on_the_host(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Rates per core that count a pool's threads, not its CPU time; rows for every pool."""
    monkeypatch.setattr(images, "usable_cpus", lambda: 3)
    loaded, preprocess = [], images.preprocess

    def noted(image: Image.Image, config: VisionConfig) -> Views:
        loaded.append(image.size)
        return preprocess(image, config)

    monkeypatch.setattr(images, "preprocess", noted)
    monkeypatch.setattr(images.time, "process_time", iter(range(1000)).__next__)
    monkeypatch.setattr(images.time, "perf_counter", iter(range(0, 8000, 8)).__next__)
    monkeypatch.setattr(images, "HOST_S", 20.0)  # two rounds by this clock
    rows = images.on_host((64, 32), CPU)
    assert [row["impl"] for row in rows] == ["1 thread", "2 threads", "3 threads"]
    assert len(loaded) == 5 + 2 * 4 * (1 + 2 + 3) and set(loaded) == {(64, 32)}
    for row in rows:
        count = 2 * 4 * row["threads"]
        assert row["images_per_core_second"] == count  # of one second
        assert row["core_ms"] == pytest.approx(1000 / count)
        assert row["images_per_second"] == pytest.approx(count / 32)
        assert row["failure"] is None
    assert rows[0]["decode_ms"] == rows[0]["cut_ms"] == 1000
    show.show(run_tables.RUNS["host_images"], rows)
    assert "3 threads" in capsys.readouterr().out


def test_a_wrong_tower_fails(monkeypatch: pytest.MonkeyPatch):
    """Guards the check of the whole tower, which no op's own check replaces."""
    right = vision_attention.vision_attention

    def wrong(qkv: torch.Tensor, *args: object, impl: str | None, **options: object):
        return right(qkv * (1 if impl == "eager" else 1.01), *args, impl=impl, **options)

    monkeypatch.setattr("model.vision.tower.vision_attention", wrong)
    monkeypatch.setattr(images, "SIZES", ((100, 100),))
    monkeypatch.setattr(images, "measure", lambda calls, **_: dict.fromkeys(calls, TIMING))
    eager, default, *_ = images.run(CPU)
    assert eager["failure"] is None
    assert "exceeds" in default["failure"]


def test_vision_flops(tiny: Step3VL):
    """The formula against PyTorch's own count of products, per view and in total. PyTorch counts
    the zeros that pad a patch."""
    config = tiny.config
    tower = Step3VL.from_preset("tiny", impl=None).vision
    tower.impl["vision_attention"] = "eager"  # the counter does not know the fused one of a CPU,
    tower.impl["linear"] = "eager"  # nor products by oneDNN
    grids = vision.views_of(1280, 720, config.vision)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        tower(images._views(tower, grids))
    zeros = row_width(config.vision.patch_size) - 3 * config.vision.patch_size**2
    padding = 2 * tokens_of(grids) * zeros * config.vision.width
    assert vision.tower_flops(grids, config) + padding == counter.get_total_flops()
    assert vision.tower_flops(grids, config) == sum(
        vision.tower_flops([grid], config) for grid in grids
    )


CPU = torch.device("cpu")
TIMING = e2e.Timing(1.0, 1.0, 1.0, 1, "clock")
