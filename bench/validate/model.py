"""The whole tiny model against fp64, transformers and timm: rows for `python -m bench validate`.

The libraries' models with our ops in them (`model.hf.patch`) are compared with fp64 as well.

In fp32 a model's error must stay below MODEL_TOLERANCE. In 16 bits it may be little more than the
error that the dtype itself causes: that of the fp64 model whose stored results are rounded to the
dtype (fp64_model.py). On a CPU, with weights from five seeds, in bfloat16 and float16, the eager
and portable forms had at most 1.19 times its RMS error and 1.51 times its largest error,
transformers 1.24 and 1.60 times.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bench.errors import Error, compare
from bench.measure.verdicts import MODEL_TOLERANCE, exact_fp32
from bench.validate import timm_judge, transformers_judge
from bench.validate.comparison import compare_result, empty_fields, fields
from bench.validate.fp64_model import Fp64Model, rounding_to
from kernels.errors import ImplError, one_line
from model.step3vl import Step3VL
from model.vision.image import Views
from model.vision.pixels import View, normalised

SEED, PROMPT = 1, 70  # more than one page of tokens
ROUNDING_LIMITS = Error(max=2.0, rms=1.25)  # in 16 bits, as multiples of the rounded model's error


class ModelSetup:
    """A model in one dtype, its inputs, and its fp64 versions.

    images: views as bytes, which our model takes
    views: the same, normalised and in the model's dtype, for the others
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.model = Step3VL.from_preset("tiny", seed=SEED, device=device, dtype=dtype)
        assert self.model.vision is not None
        self.tower = self.model.vision
        vision, tokens = self.tower.config, self.model.config.tokens
        draw = torch.Generator().manual_seed(SEED)
        sides = (vision.crop_size, vision.image_size, 5 * vision.patch_size)
        pixels = [
            torch.randint(0, 256, (side, side, 3), generator=draw, dtype=torch.uint8)
            for side in sides
        ]
        self.images = [View(view, len(view)) for view in pixels]
        self.views = [normalised(view).to(device, dtype) for view in pixels]
        self.ids = torch.randint(0, 256, (PROMPT,), generator=draw).to(device)
        count = self.tower.count(self.images)
        image = [tokens.im_start, *[tokens.im_patch] * count, tokens.im_end]
        self.mixed = torch.tensor([7, *image, 9, 10, 11], device=device)

    @cached_property
    def exact(self) -> Fp64Model:
        return Fp64Model(self.model)

    @cached_property
    def rounded(self) -> Fp64Model:
        return Fp64Model(self.model, rounding_to(self.model.dtype))

    def tokens(self) -> Tensor:
        """Our tower's output for the first view."""
        views = self.images[:1]
        return self.tower.tower(self.tower.patches(views), self.tower.grids(views))

    def mixed_logits(self) -> Tensor:
        """Our model's logits for text with the views in it, each as an image without crops."""
        images = [
            Views(view.pixels, view.pixels.new_empty(0, *view.pixels.shape), ())
            for view in self.images
        ]
        return self.model(self.mixed, images)


@dataclass(frozen=True)
class ModelCase:
    """One result of the model: from our model, the fp64 model and libraries that compute it."""

    name: str
    ours: Callable[[ModelSetup], Tensor]
    exact: Callable[[ModelSetup, Fp64Model], Tensor]
    libraries: dict[str, Callable[[ModelSetup, str | None], Tensor]]  # patched with an impl, or not
    op: str = "model"
    modes: tuple[str, ...] = ()


CASES = (
    ModelCase(
        f"decoder, {PROMPT} tokens",
        lambda setup: setup.model(setup.ids),
        lambda setup, exact: exact.logits(setup.ids),
        {
            "transformers": lambda setup, impl: transformers_judge.logits(
                setup.model, setup.ids, [], impl
            )
        },
    ),
    ModelCase(
        "vision tower, one view",
        ModelSetup.tokens,
        lambda setup, exact: exact.tokens(setup.views[0]),
        {"timm": lambda setup, impl: timm_judge.tokens(setup.model, setup.views[0], impl)},
    ),
    ModelCase(
        "vision embeddings, 3 views",
        lambda setup: setup.tower(setup.images),
        lambda setup, exact: exact.features(setup.views),
        {
            "transformers": lambda setup, impl: transformers_judge.features(
                setup.model, setup.views, impl
            )
        },
    ),
    ModelCase(
        "3 views and text",
        ModelSetup.mixed_logits,
        lambda setup, exact: exact.logits(setup.mixed, setup.views),
        {
            "transformers": lambda setup, impl: transformers_judge.logits(
                setup.model, setup.mixed, setup.views, impl
            )
        },
    ),
)


@torch.inference_mode()
def verdicts(
    case: ModelCase, setup: ModelSetup, forms: Sequence[str], libraries: bool
) -> list[tuple[str, str, dict]]:
    """Form, reference and row fields: each form against fp64 and, in fp32, against libraries.

    With `libraries` the libraries are compared with fp64, too, and judged in fp32 only; their
    models with our ops in them are judged in all dtypes. Raises ImplError for a form that cannot
    run here.
    """
    fp32 = setup.model.dtype == torch.float32
    expected = case.exact(setup, setup.exact)
    allowed = _allowed(case, setup, expected)
    results, rows = {}, []
    for form in forms:
        try:
            results[form] = _ours(case, setup, form)
        except ImplError:
            raise
        except Exception as error:  # a broken form must not hide the others
            rows.append((form, "fp64", empty_fields(failure=one_line(error))))
    rows += [(form, "fp64", _fields(result, expected, allowed)) for form, result in results.items()]
    for library, judge in case.libraries.items():
        try:
            with exact_fp32():
                library_result = judge(setup, None)
        except ImportError as error:
            rows.append((library, "fp64", empty_fields(skipped=_missing(library, error))))
            continue
        if libraries:
            limit = allowed if fp32 else None
            rows.append((library, "fp64", _fields(library_result, expected, limit)))
        for form, result in results.items() if fp32 else ():
            rows.append((form, library, _fields(result, library_result, allowed)))
        for form in forms if libraries else ():
            rows.append(
                (f"{library} with {form}", "fp64", _patched(form, judge, setup, expected, allowed))
            )
    return rows


def _patched(
    form: str,
    judge: Callable[[ModelSetup, str | None], Tensor],
    setup: ModelSetup,
    expected: Tensor,
    allowed: Error,
) -> dict:
    """Row fields of a library's model with our ops."""
    try:
        with exact_fp32():
            return _fields(judge(setup, form), expected, allowed)
    except ImplError:
        raise
    except Exception as error:
        return empty_fields(failure=one_line(error))


def _ours(case: ModelCase, setup: ModelSetup, form: str) -> Tensor:
    setup.model.set_impl(form)
    with exact_fp32():
        return case.ours(setup)


def _fields(result: Tensor, expected: Tensor, allowed: Error | None) -> dict:
    return fields([compare_result("out", result, expected, allowed)])


def _allowed(case: ModelCase, setup: ModelSetup, expected: Tensor) -> Error:
    if setup.model.dtype == torch.float32:
        return Error(MODEL_TOLERANCE, MODEL_TOLERANCE)
    rounding = compare(case.exact(setup, setup.rounded), expected)
    return Error(ROUNDING_LIMITS.max * rounding.max, ROUNDING_LIMITS.rms * rounding.rms)


def _missing(library: str, error: ImportError) -> str:
    return f"{library} is not installed" if error.name == library else str(error)
