"""Images: `python -m bench e2e --vision`.

- One image at a time, by size: from the pixels of its views, as bytes on the device, to its decoder
  embeddings: embedding, tower and projector. Views are not resized.
- The same for many requests: each by itself, and all their views packed into one call.
- The host's part: from a JPEG to views, in threads. Pixels are those of the 10B on any device.

The image cache and the tower's own CUDA graphs are off: every call encodes, and the one timer
captures every form alike. Weights and pixels are random; times do not depend on them.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor

from bench.errors import compare
from bench.inputs.photos import jpeg
from bench.inputs.presets import BIG, vision_of
from bench.inputs.views import tower_flops, views_of
from bench.measure.devices import MAIN_DTYPE
from bench.measure.origin import origin
from bench.measure.rows import measured, with_speedups
from bench.measure.timing import measure
from bench.measure.verdicts import judged
from bench.studies.decode import FORMS
from kernels.projector import output_tokens
from kernels.runtime.grids import Grid
from model.config import PRESETS, Config
from model.impls import impl_per_op
from model.terminal import track, usable_cpus
from model.vision.image import load_image, preprocess
from model.vision.tower import VisionTower
from model.weights.random_init import random_init
from pacore_sched.answers.image_loader import MAX_THREADS, ImageLoader

MODELS = {"cpu": "tiny", "cuda": "step3-vl-10b"}
SIZES = ((728, 728), (1280, 720), (1920, 1080), (3024, 3024))  # width, height
LOAD_SIZE, LOAD_IMAGES, LOAD_REQUESTS = (1280, 720), 2, 8
HOST_SIZES = ((640, 360), (1280, 720), (1920, 1080), (3024, 3024))
HOST_S = 1.0  # per row, at least
ALONE, PACKED = "one request at a time", "packed"


def run(device: torch.device) -> Iterator[dict]:
    """Rows for an image of each of SIZES, for the load, and for the host's part."""
    config = PRESETS[MODELS[device.type]]
    tower = random_tower(config, device)
    for size in track(SIZES, "images"):
        yield from encode(tower, config, size)
    yield from load(tower, config)
    for size in track(HOST_SIZES, "on the host"):
        yield from on_host(size, device)


def random_tower(config: Config, device: torch.device) -> VisionTower:
    """A vision tower with random weights, in the device's main dtype."""
    impl, dtype = impl_per_op(None), MAIN_DTYPE[device.type]
    vision, hidden = vision_of(config), config.decoder.hidden
    tower = VisionTower(vision, hidden, impl=impl, device=device, dtype=dtype)
    random_init(tower.checkpoint_tensors(), 0)
    return tower


def forms_on(device_type: str) -> dict[str, str | None]:
    """The timed forms, each with its `impl` for all ops."""
    return FORMS | ({"portable": "portable"} if device_type == "cuda" else {})


def case_name(config: Config, size: tuple[int, int]) -> str:
    """Such as "tiny 728 x 728"."""
    return f"{config.name} {size[0]} x {size[1]}"


def encode(
    tower: VisionTower,
    config: Config,
    size: tuple[int, int],
    budget_s: float = 4.0,
    names: Sequence[str] = (),
) -> list[dict]:
    """Rows of one image of (width, height) pixels in the forms `names`, or all if empty."""
    device, dtype = tower.projector.device, tower.projector.dtype
    grids = views_of(*size, tower.config)
    views, tokens = _views(tower, grids), sum(map(output_tokens, grids))
    tower.graphs.enabled = False
    forms = {
        name: impl for name, impl in forms_on(device.type).items() if name in names or not names
    }

    def encoded(impl: str | None) -> Tensor:
        tower.impl.update(impl_per_op(impl))
        return tower(views)

    expected = encoded("eager")
    errors = {name: compare(encoded(impl), expected) for name, impl in forms.items()}
    calls = {name: lambda _, impl=impl: encoded(impl) for name, impl in forms.items()}
    timings = measure(calls, device=device, budget_s=budget_s)
    weights = sum(parameter.nbytes for parameter in tower.parameters())
    rows = []
    for name in forms:
        row = measured(
            "vision",
            case_name(config, size),
            name,
            device=device,
            dtype=dtype,
            num_bytes=weights + sum(view.nbytes for view in views),
            flops=tower_flops(grids, config),
            verdict=judged(errors[name], dtype),
            timing=timings[name],
        )
        row |= {"views": len(views), "tokens": tokens}
        if row["median_us"]:
            row["tflop_s"] = row["flops"] / row["median_us"] / 1e6
            row["gemm_pct"] = 100 * row["tflop_s"] / row["gemm_tflop_s"]
        rows.append(row)
    return with_speedups(rows)


def load(tower: VisionTower, config: Config) -> list[dict]:
    """Rows of LOAD_REQUESTS requests of LOAD_IMAGES images by the default ops: ALONE, PACKED."""
    device, dtype = tower.projector.device, tower.projector.dtype
    grids = views_of(*LOAD_SIZE, tower.config) * LOAD_IMAGES
    requests = [_views(tower, grids) for _ in range(LOAD_REQUESTS)]
    tower.graphs.enabled = False
    tower.impl.update(impl_per_op(None))

    def alone() -> Tensor:
        return torch.cat([tower(views) for views in requests])

    def packed() -> Tensor:
        return tower([view for views in requests for view in views])

    forms: dict[str, Callable[[], Tensor]] = {ALONE: alone, PACKED: packed}
    error = compare(packed(), alone())
    calls = {name: lambda _, form=form: form() for name, form in forms.items()}
    timings = measure(calls, device=device, budget_s=4.0)
    weights = sum(parameter.nbytes for parameter in tower.parameters())
    rows = []
    for name, passes in ((ALONE, LOAD_REQUESTS), (PACKED, 1)):
        row = measured(
            "vision_load",
            f"{case_name(config, LOAD_SIZE)}, {LOAD_REQUESTS} requests of {LOAD_IMAGES}",
            name,
            device=device,
            dtype=dtype,
            num_bytes=passes * weights + sum(v.nbytes for views in requests for v in views),
            flops=LOAD_REQUESTS * tower_flops(grids, config),
            verdict=judged(error, dtype),
            timing=timings[name],
        )
        row |= {"views": LOAD_REQUESTS * len(grids)}
        if row["median_us"]:
            row["images_per_second"] = 1e6 * LOAD_REQUESTS * LOAD_IMAGES / row["median_us"]
            row["tflop_s"] = row["flops"] / row["median_us"] / 1e6
            row["packing_gain"] = timings[ALONE].median_us / row["median_us"]
        rows.append(row)
    return rows


def on_host(size: tuple[int, int], device: torch.device) -> list[dict]:
    """Rows of loading JPEGs of a size in 1, 2, 4 .. threads, as many as ImageLoader would have.

    core_ms: CPU time of the process per image; decode_ms, cut_ms: of that, in one thread. `cut` is
    all of `preprocess`: shrinking, cutting and the digest.
    """
    data, vision = jpeg(random.Random(0), size), vision_of(BIG)
    image = load_image(data)
    parts = {
        "decode_ms": _core_ms(lambda: load_image(data)),
        "cut_ms": _core_ms(lambda: preprocess(image, vision)),
    }
    most = min(usable_cpus(), MAX_THREADS)
    rows = []
    for threads in sorted({1, most, *(n for n in (2, 4) if n < most)}):
        with closing(ImageLoader(threads)) as loader:
            count, begin, cpu = 0, time.perf_counter(), time.process_time()
            while time.perf_counter() - begin < HOST_S:
                loader.load([lambda: preprocess(load_image(data), vision)] * (4 * threads))
                count += 4 * threads
            seconds, core_s = time.perf_counter() - begin, time.process_time() - cpu
        row = {
            "op": "host_images",
            "case": f"{size[0]} x {size[1]}",
            "impl": f"{threads} {'thread' if threads == 1 else 'threads'}",
            "dtype": "none",
            "threads": threads,
            "images_per_second": count / seconds,
            "core_ms": 1e3 * core_s / count,
            "images_per_core_second": count / core_s,
            **(parts if threads == 1 else {}),
            "failure": None,
        }
        rows.append(row | origin(device))
    return rows


def _core_ms(call: Callable[[], object], repeats: int = 5) -> float:
    """CPU time of a call, the least of some."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return 1e3 * min(times)


def _views(tower: VisionTower, grids: Sequence[Grid]) -> list[Tensor]:
    """Random bytes, on the weights' device."""
    device, size = tower.projector.device, tower.config.patch_size
    generator = torch.Generator(device).manual_seed(0)

    def view(rows: int, columns: int) -> Tensor:
        shape = size * rows, size * columns, 3
        return torch.randint(0, 256, shape, generator=generator, device=device, dtype=torch.uint8)

    return [view(*grid) for grid in grids]
