"""Prompts and images that come again, on the tiny model: the prefix cache from end to end."""

from collections.abc import Sequence

import pytest
import torch
from PIL import Image

from model.config import TINY
from model.kv_cache import PAGE_SIZE
from model.step3vl import Step3VL
from model.text.prompt import build_prompt
from model.vision.image import Views, load_image, preprocess
from pacore_sched.answers.pacore import Pacore, engine_for
from pacore_sched.answers.problem_run import Problem
from pacore_sched.sched.request import Sampling

SYSTEM = {"role": "system", "content": "Answer in one word, and do not explain what you say. " * 4}
SAMPLING = Sampling(8)


@pytest.fixture(scope="module")
def tiny() -> Step3VL:
    return Step3VL.from_preset("tiny", seed=1)


def photo(color: int) -> Views:
    image = Image.new("RGB", (90, 60), (color, 40, 200 - color))
    return preprocess(load_image(image), TINY.vision)


def asked(text: str, images: int = 0) -> list[dict]:
    parts = [{"type": "image"}] * images
    return [SYSTEM, {"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


class Client:
    """Asks one question after the other, and compares the answers with the model's own loop."""

    def __init__(self, tiny: Step3VL, monkeypatch: pytest.MonkeyPatch, **options: object) -> None:
        self.tiny = tiny
        options = {"kv_tokens": 8192, "max_running": 4} | options
        self.pacore = Pacore(tiny, engine_for(tiny, **options), [], SAMPLING)
        self.encoded: list[int] = []  # views of each call of the tower
        encode = tiny.vision.forward

        def encoding(views: Sequence[torch.Tensor], between: object = None) -> torch.Tensor:
            self.encoded.append(len(views))
            return encode(views, between)

        monkeypatch.setattr(tiny.vision, "forward", encoding)

    def ask(self, messages: list[dict], views: Sequence[Views] = (), salt: str = "") -> int:
        """The tokens of the prompt whose KV was found."""
        counts = self.pacore.engine.scheduler.counts
        found, prefilled = counts.found, counts.prefilled
        load = (lambda: views) if views else None
        (answer,) = self.pacore.answers([Problem(messages, load, salt=salt)])
        (result,) = answer.rounds[0].rollouts
        ids = build_prompt(messages, self.tiny.tokenizer, TINY, views)
        encoded = len(self.encoded)
        options = {"max_tokens": 8, "temperature": 1.0, "seed": result.seed}
        assert list(result.tokens) == self.tiny.generate(ids, views, **options)
        del self.encoded[encoded:]
        assert counts.found - found + counts.prefilled - prefilled == len(ids) - 1
        self.pacore.engine.scheduler.check_integrity()
        return counts.found - found


@pytest.mark.parametrize("ahead", [False, True])
def test_texts(tiny: Step3VL, monkeypatch: pytest.MonkeyPatch, ahead: bool):
    """KV of the wrong tokens or positions; a system prompt that is prefilled again."""
    client = Client(tiny, monkeypatch, ahead=ahead)
    system = len(build_prompt([SYSTEM], tiny.tokenizer, TINY, [])) // PAGE_SIZE * PAGE_SIZE
    assert system > 100
    assert client.ask(asked("2 + 2?")) == 0
    assert client.ask(asked("7 - 9? And why is that so?")) == system
    again = client.ask(asked("2 + 2?"))
    assert again >= system
    turn = [*asked("2 + 2?"), {"role": "assistant", "content": "4"}]
    assert client.ask([*turn, {"role": "user", "content": "Sure?"}]) >= system
    assert client.ask(asked("2 + 2?"), salt="mine") == 0
    assert client.ask(asked("2 + 2?"), salt="mine") > system


def test_images(tiny: Step3VL, monkeypatch: pytest.MonkeyPatch):
    """A photo that is encoded or prefilled again; another photo's KV or embeddings."""
    client = Client(tiny, monkeypatch)
    one, other = photo(10), photo(120)
    first = client.ask(asked("How many?", images=1), [one])
    assert first == 0 and client.encoded == [1]
    same = client.ask(asked("Which colour?", images=1), [one])
    text_only = client.ask(asked("Which colour?", images=1), [other])
    assert 0 < text_only < same - TINY.vision.image_tokens // 2
    assert client.encoded == [1, 1]
    both = client.ask(asked("Which?", images=2), [one, other])
    assert both == text_only and client.encoded == [1, 1]
    assert client.ask(asked("How many?", images=1), [one], "mine") == 0
    assert client.encoded == [1, 1, 1]


def test_images_in_batches(tiny: Step3VL, monkeypatch: pytest.MonkeyPatch):
    """Embeddings of another image, or of views in another order, from a batch; a tower that waits
    for decoding that has ended."""
    client = Client(tiny, monkeypatch, vision_batch=10**6, vision_budget="latency")
    for number in range(3):
        views = [photo(10 + number), photo(200 - 50 * number)]
        client.ask(asked("Which is brighter?", images=2), views)
    assert client.encoded == [2, 2, 2]


def test_switched_off(tiny: Step3VL, monkeypatch: pytest.MonkeyPatch):
    client = Client(tiny, monkeypatch, prefix_cache=False)
    for _ in range(2):
        assert client.ask(asked("How many?", images=1), [photo(10)]) == 0
    assert client.encoded == [1, 1]
    assert not client.pacore.engine.scheduler.tree.kept


def test_too_little_memory(tiny: Step3VL, monkeypatch: pytest.MonkeyPatch):
    """Kept KV and images that are in the way of those that are needed."""
    client = Client(tiny, monkeypatch, kv_tokens=400, image_bytes=1)
    for number in range(6):
        client.ask(asked(f"{number}?", images=1), [photo(20 * number)])
        client.ask(asked("Short?"))
    assert client.encoded == [1] * 6
    assert client.ask(asked("5?", images=1), [photo(100)]) > 0
    assert client.encoded == [1] * 7


def test_requests_at_the_same_time(tiny: Step3VL, monkeypatch: pytest.MonkeyPatch):
    """Prompts that are prefilled next to each other although they begin alike."""
    client = Client(tiny, monkeypatch)
    problems = [Problem(asked(f"{number}?"), id=f"p{number}") for number in range(12)]
    answers = {answer.problem: answer for answer in client.pacore.answers(problems)}
    counts = client.pacore.engine.scheduler.counts
    prompts = {
        problem.id: build_prompt(problem.messages, tiny.tokenizer, TINY, []) for problem in problems
    }
    assert counts.prefilled <= len(prompts["p0"]) + 11 * PAGE_SIZE
    for id, ids in prompts.items():
        (result,) = answers[id].rounds[0].rollouts
        options = {"max_tokens": 8, "temperature": 1.0, "seed": result.seed}
        assert list(result.tokens) == tiny.generate(ids, [], **options)


def test_a_step_that_was_interrupted(tiny: Step3VL, monkeypatch: pytest.MonkeyPatch):
    """KV that was to be written when Ctrl-C came, found by the next question on the same engine."""
    client = Client(tiny, monkeypatch)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(tiny.decoder), "forward", interrupt)
        client.ask(asked("2 + 2?"))
    assert client.ask(asked("2 + 2?")) == 0
    assert client.ask(asked("2 + 3?")) > 100
