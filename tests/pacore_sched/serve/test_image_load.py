"""Images under load, on the tiny model: what they need ends with them."""

import base64
import gc
import io
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from model.config import VisionConfig
from model.step3vl import Step3VL
from model.vision.image import Views
from pacore_sched.answers.image_loader import ImageLoader
from pacore_sched.answers.live import LiveProblems
from pacore_sched.answers.pacore import engine_for
from pacore_sched.serve import service as service_module
from pacore_sched.serve.api import chat
from pacore_sched.serve.limits import Limits
from pacore_sched.serve.metrics import Metrics
from pacore_sched.serve.service import Service
from tests.pacore_sched.serve.serving import Running, client, running, wait_for

WAIT_S = 20


def service_of(model: Step3VL) -> Service:
    engine = engine_for(model, kv_tokens=20_000, max_running=16, prefix_cache=False)
    made = Service(model, engine, Limits(), Metrics("tiny"))
    made.image_loader.close()
    made.image_loader = ImageLoader(2)
    return made


@pytest.fixture(scope="module")
def tiny() -> Step3VL:
    return Step3VL.from_preset("tiny", seed=3)


@pytest.fixture
def server(tiny: Step3VL) -> Iterator[Running]:
    with running(service_of(tiny), "tiny") as found:
        yield found
        found.wait_idle()


def with_images(*shades: int) -> dict:
    """A chat request with an image per shade of grey; 256 is no image."""
    parts = []
    for shade in shades:
        file = io.BytesIO()
        if shade < 256:
            Image.new("RGB", (120, 90), (shade, shade, shade)).save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    content = [*parts, {"type": "text", "text": "?"}]
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 3,
    }


class Gate:
    """Holds the decoding of images until it is opened, and notes their shades."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[int] = []
        self._open, self._preprocess = threading.Event(), chat.preprocess
        monkeypatch.setattr(chat, "preprocess", self._held)
        self.open: Callable[[], None] = self._open.set

    def _held(self, image: Image.Image, config: VisionConfig) -> Views:
        self.begun.append(image.getpixel((0, 0))[0])
        self._open.wait(WAIT_S)
        return self._preprocess(image, config)


def test_images_of_a_client_that_has_left_are_not_loaded(
    server: Running, monkeypatch: pytest.MonkeyPatch
):
    """Images that no request needs any more, decoded while others wait."""
    gate = Gate(monkeypatch)
    with ThreadPoolExecutor(1) as threads:
        stays = threads.submit(server.post, "/v1/chat/completions", with_images(1, 2))
        wait_for(lambda: len(gate.begun) == 2, "two images")
        with client(server, **with_images(3, 4, 5, 6)):
            wait_for(lambda: server.service.image_loader._pool._work_queue.qsize() == 2, "waiting")
        wait_for(lambda: len(server.service.jobs) == 1, "the end of the job")
        gate.open()
        assert stays.result(WAIT_S).status == 200
    assert server.post("/v1/chat/completions", with_images(7)).status == 200
    assert sorted(gate.begun) == [1, 2, 7]


def test_the_first_broken_image_is_named(server: Running):
    """The image that failed first in time, or the place of another."""
    for shades, place in (((1, 256, 256), 1), ((256, 2), 0), ((1, 2, 3, 256), 3)):
        reply = server.post("/v1/chat/completions", with_images(*shades))
        assert reply.status == 400
        error = reply.json["error"]
        assert error["param"] == f"messages[0].content[{place}].image_url.url"
        assert error["message"].startswith("the image cannot be used: ")


def test_pixels_in_memory_are_bounded(
    server: Running, tiny: Step3VL, monkeypatch: pytest.MonkeyPatch
):
    """Images of all waiting requests decoded at once, to wait for the tower; or a request that is
    larger than the budget, and never begins."""
    service, gate, encoding = server.service, threading.Event(), threading.Event()
    encode = tiny.vision.forward

    def slow(views: list, between: object) -> torch.Tensor:
        encoding.set()
        gate.wait(WAIT_S)
        return encode(views, between)

    monkeypatch.setattr(tiny.vision, "forward", slow)
    monkeypatch.setattr(service_module, "PIXEL_BYTES", 1)
    prepared: list[int] = []
    prepare = chat.preprocess

    def noted(image: Image.Image, config: VisionConfig) -> Views:
        prepared.append(image.getpixel((0, 0))[0])
        return prepare(image, config)

    monkeypatch.setattr(chat, "preprocess", noted)
    with ThreadPoolExecutor(4) as threads:
        first = threads.submit(server.post, "/v1/chat/completions", with_images(1, 2))
        assert encoding.wait(WAIT_S)
        rest = [
            threads.submit(server.post, "/v1/chat/completions", with_images(10 + i))
            for i in range(3)
        ]
        wait_for(lambda: service.waiting >= 3, "waiting requests")
        assert server.get("/health").status == 200  # the event loop goes on meanwhile
        assert sorted(prepared) == [1, 2]
        assert sum(job.run.pixel_bytes for job in service.jobs) > 0
        gate.set()
        assert [future.result(WAIT_S).status for future in [first, *rest]] == [200] * 4
    assert len(prepared) == 5


@pytest.fixture
def pixels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref]]:
    """Weak references to the views of all images. The cyclic collector is off: its full collections
    are rare."""
    views, prepare = [], chat.preprocess

    def watched(image: Image.Image, config: VisionConfig) -> Views:
        made = prepare(image, config)
        views.append(weakref.ref(made))
        return made

    monkeypatch.setattr(chat, "preprocess", watched)
    gc.collect()
    gc.disable()
    yield views
    gc.enable()


def test_images_under_load_leave_nothing(tiny: Step3VL, pixels: list[weakref.ref]):
    """Threads or pixels that stay: of answers, of broken images, of clients that left."""
    threads_before = threading.active_count()
    with running(service_of(tiny), "tiny") as server:
        send_mixed(server)
        server.wait_idle()
        assert len(pixels) >= 48
        wait_for(lambda: not any(ref() for ref in pixels), "the end of all pixels")
    assert threading.active_count() <= threads_before


@pytest.mark.parametrize("stage", ["loading", "waiting", "too long"])
def test_pixels_of_requests_that_never_start(
    server: Running, pixels: list[weakref.ref], monkeypatch: pytest.MonkeyPatch, stage: str
):
    """Pixels in a cycle of tracebacks: of a client that leaves while they are loaded or while its
    request waits for the engine, or of a request that is refused for its length."""
    gate, service = Gate(monkeypatch), server.service
    body = with_images(1, 2)
    if stage == "too long":
        gate.open()
        body["max_tokens"] = 19_999
        assert server.post("/v1/chat/completions", body).status == 400
    else:
        monkeypatch.setattr(LiveProblems, "has_room", lambda live, run: False)
        with client(server, **body):
            wait_for(lambda: len(gate.begun) == 2, "two images")
            if stage == "waiting":
                gate.open()
                wait_for(lambda: service.thread._waiting, "a request that waits")
        wait_for(lambda: not service.jobs, "the end of the job")
        gate.open()
    wait_for(lambda: len(pixels) == 2 and not any(ref() for ref in pixels), "their end")


def send_mixed(server: Running) -> None:
    """40 requests of two images, 8 at a time; of five, one is broken, and one's client leaves."""

    def one(number: int) -> int:
        body = with_images(number, 256 if number % 5 == 3 else number + 100)
        if number % 5 != 4:
            return server.post("/v1/chat/completions", body).status
        with client(server, **body):
            return 200

    with ThreadPoolExecutor(8) as threads:
        statuses = list(threads.map(one, range(40)))
    assert statuses == [400 if number % 5 == 3 else 200 for number in range(40)]
