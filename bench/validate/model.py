"""The whole tiny model against fp64, transformers and timm: rows for `python -m bench validate`.

In fp32 a model's error must stay below MODEL_TOLERANCE. In 16 bits it may be little more than what
the dtype costs by itself: the error of the fp64 model whose results are rounded to the dtype where
the model stores them (fp64_model.py). On a CPU the eager and portable forms had at most 1.19 times
its RMS error and 1.51 times its largest one, transformers 1.24 and 1.60 times: weights from five
seeds, bfloat16 and float16.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bench.numerics import MODEL_TOLERANCE, Error, compare, exact_fp32
from bench.validate import timm_judge, transformers_judge
from bench.validate.comparison import compared, fields, nothing
from bench.validate.fp64_model import Exact, rounding_to
from kernels.errors import ImplError, one_line
from model.step3vl import Step3VL
from model.vision.image import Views

SEED, PROMPT = 1, 70  # more than one page of tokens
OF_ROUNDING = Error(max=2.0, rms=1.25)  # allowed in 16 bits, of the rounded model's error


class Work:
    """A model of one dtype, its inputs in that dtype, and its fp64 twins."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.model = Step3VL.from_preset("tiny", seed=SEED, device=device, dtype=dtype)
        vision, tokens = self.model.config.vision, self.model.config.tokens
        draw = torch.Generator().manual_seed(SEED)
        sides = (vision.crop_size, vision.image_size, 5 * vision.patch_size)
        self.views = [
            torch.randn(3, side, side, generator=draw).to(device, dtype) for side in sides
        ]
        self.ids = torch.randint(0, 256, (PROMPT,), generator=draw).to(device)
        counts = [self.model.vision.count([view]) for view in self.views]
        image = [tokens.im_start, *[tokens.im_patch] * sum(counts), tokens.im_end]
        self.mixed = torch.tensor([7, *image, 9, 10, 11], device=device)

    @cached_property
    def exact(self) -> Exact:
        return Exact(self.model)

    @cached_property
    def rounded(self) -> Exact:
        return Exact(self.model, rounding_to(self.model.dtype))

    def tokens(self) -> Tensor:
        """Our tower on the first view."""
        vision, views = self.model.vision, self.views[:1]
        return vision.tower(vision.patches(views, vision.grids(views)), vision.grids(views))

    def logits_of_mixed(self) -> Tensor:
        """Our model on text with the views' tokens in it, each view an image without crops."""
        images = [Views(view, view.new_empty(0, *view.shape), ()) for view in self.views]
        return self.model(self.mixed, images)


@dataclass(frozen=True)
class ModelCase:
    """One result of a model: ours, the fp64 twin's, and those of libraries that have it."""

    name: str
    ours: Callable[[Work], Tensor]
    exact: Callable[[Work, Exact], Tensor]
    libraries: dict[str, Callable[[Work], Tensor]]
    op: str = "model"
    modes: tuple[str, ...] = ()


CASES = (
    ModelCase(
        f"decoder, {PROMPT} tokens",
        lambda work: work.model(work.ids),
        lambda work, exact: exact.logits(work.ids),
        {"transformers": lambda work: transformers_judge.logits(work.model, work.ids, [])},
    ),
    ModelCase(
        "vision tower, one view",
        Work.tokens,
        lambda work, exact: exact.tokens(work.views[0]),
        {"timm": lambda work: timm_judge.tokens(work.model, work.views[0])},
    ),
    ModelCase(
        "vision embeddings, 3 views",
        lambda work: work.model.vision(work.views),
        lambda work, exact: exact.features(work.views),
        {"transformers": lambda work: transformers_judge.features(work.model, work.views)},
    ),
    ModelCase(
        "3 views and text",
        Work.logits_of_mixed,
        lambda work, exact: exact.logits(work.mixed, work.views),
        {
            "transformers": lambda work: transformers_judge.logits(
                work.model, work.mixed, work.views
            )
        },
    ),
)


@torch.inference_mode()
def verdicts(
    case: ModelCase, work: Work, forms: Sequence[str], libraries: bool
) -> list[tuple[str, str, dict]]:
    """Form, reference and what came of the two: each form against fp64, in fp32 against libraries.

    What came of them is a row's `comparison.fields`. With `libraries` also these themselves against
    fp64, judged in fp32 only. Raises ImplError for a form that cannot run here.
    """
    fp32 = work.model.dtype == torch.float32
    expected = case.exact(work, work.exact)
    allowed = _allowed(case, work, expected)
    results, made = {}, []
    for form in forms:
        try:
            results[form] = _ours(case, work, form)
        except ImplError:
            raise
        except Exception as error:  # a broken form must not hide the others
            made.append((form, "fp64", nothing(failure=one_line(error))))
    made += [(form, "fp64", _fields(result, expected, allowed)) for form, result in results.items()]
    for library, judge in case.libraries.items():
        try:
            with exact_fp32():
                judged = judge(work)
        except ImportError as error:
            made.append((library, "fp64", nothing(skipped=_missing(library, error))))
            continue
        if libraries:
            limit = allowed if fp32 else None
            made.append((library, "fp64", _fields(judged, expected, limit)))
        for form, result in results.items() if fp32 else ():
            made.append((form, library, _fields(result, judged, allowed)))
    return made


def _ours(case: ModelCase, work: Work, form: str) -> Tensor:
    work.model.set_impl(form)
    with exact_fp32():
        return case.ours(work)


def _fields(result: Tensor, expected: Tensor, allowed: Error | None) -> dict:
    return fields([compared("out", result, expected, allowed)])


def _allowed(case: ModelCase, work: Work, expected: Tensor) -> Error:
    if work.model.dtype == torch.float32:
        return Error(MODEL_TOLERANCE, MODEL_TOLERANCE)
    cost = compare(case.exact(work, work.rounded), expected)
    return Error(OF_ROUNDING.max * cost.max, OF_ROUNDING.rms * cost.rms)


def _missing(library: str, error: ImportError) -> str:
    return f"{library} is not installed" if error.name == library else str(error)
