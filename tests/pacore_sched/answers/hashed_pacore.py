"""PaCoRe on a fake model whose tokens are hashes, and problems for it."""

from collections.abc import Iterable
from types import SimpleNamespace

from model.config import TINY
from model.text.tokenizer import Tokenizer
from model.vision.image import Views
from pacore_sched.answers.live import Answer
from pacore_sched.answers.pacore import Pacore
from pacore_sched.answers.problem_run import Problem
from pacore_sched.engine.engine import Engine
from pacore_sched.engine.stopping import Stopping
from pacore_sched.sched.request import Sampling, Segment
from tests.support.fake_executor import EOS, FakeExecutor, segment

SAMPLING = Sampling(max_tokens=12)
TOKENIZER = Tokenizer.byte_level(TINY)


class HashExecutor(FakeExecutor):
    """A fake model whose images are ready after three polls."""

    image_bytes = 10**9

    def feature_bytes(self, views: list[Views]) -> int:
        return len(views)

    def segment(
        self,
        ids: list[int],
        features: object = None,
        first: int = 0,
        scores: None = None,
        salt: str = "",
    ) -> Segment:
        prompt = segment(ids)
        prompt.ready = features.ready if features else prompt.ready
        return prompt

    def encode(self, views: list[Views], salt: str) -> SimpleNamespace:
        polls = iter([*[False] * 3, *[True] * 1000])
        return SimpleNamespace(
            error=None, ready=lambda: next(polls), waiting=False, release=lambda: None
        )


HASHES = SimpleNamespace(config=TINY, tokenizer=TOKENIZER)


def hashed(widths: tuple[int, ...] = (3, 2), pages: int = 4000, **options: object) -> Pacore:
    names = ("policy", "ahead", "speculate", "max_running")
    engine_options = {name: options.pop(name) for name in names if name in options}
    engine = Engine(HashExecutor(pages), Stopping(TOKENIZER, [EOS]), **engine_options)
    return Pacore(HASHES, engine, widths, SAMPLING, **options)


def questions(count: int) -> list[Problem]:
    return [Problem([{"role": "user", "content": f"{n}?"}], id=f"p{n}") for n in range(count)]


def with_image(text: str) -> Problem:
    """A problem named "photo"."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    layout = SimpleNamespace(newlines=(False,), all=())
    return Problem([{"role": "user", "content": content}], lambda: [layout], id="photo")


def by_problem(answers: Iterable[Answer]) -> dict[str, Answer]:
    return {answer.problem: answer for answer in answers}


def is_idle(engine: Engine) -> bool:
    """Whether the engine has no work and holds no page."""
    engine.scheduler.check_integrity()
    tree = engine.scheduler.tree
    return not engine.busy and tree.free_pages == tree.num_pages
