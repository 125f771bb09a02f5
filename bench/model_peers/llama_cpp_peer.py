"""llama.cpp, through the C functions of llama-cpp-python: the same GGUF file, still quantised.

A prompt is read once, as sequence 0, and its KV is shared with the other sequences
(`llama_memory_seq_cp` over a unified KV cache). llama.cpp gets as many threads as torch uses, and
the fastest of SETTINGS for the work at hand.
"""

import ctypes
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from bench.model_peers.peer import Generate, ModelPeer, OnStep, Work, on_cpu
from bench.peers.peer import Library, Unavailable, distribution, imported
from model.config import Config
from model.errors import InputError
from model.step3vl import Step3VL
from model.weights.gguf import smollm2_path

GGUF_FILES: dict[str, Callable[[], Path]] = {"smollm2-135m": smollm2_path}  # by model
ERROR = 4  # GGML_LOG_LEVEL_ERROR

T = TypeVar("T")


class Settings(NamedTuple):
    """What llama.cpp lets a user choose for speed: the tokens of one forward pass, and whether to
    use its flash attention."""

    flash: bool
    ubatch: int


# On 2 cores with AVX-512, the better of 64 to 2,048 tokens, with and without flash attention, for
# SmolLM2 and prompts of 512 and 2,048 tokens. Which of the two wins depends on the work.
SETTINGS = (Settings(flash=False, ubatch=128), Settings(flash=True, ubatch=512))


class Row(NamedTuple):
    """A token to read: its place in a sequence, and whether its logits are wanted."""

    token: int
    position: int
    sequence: int
    logits: bool


def library() -> ModuleType:
    """The package's functions. Raises Unavailable if it is not installed, or too old."""
    functions = imported("llama_cpp")
    if not hasattr(functions.llama_context_params, "kv_unified"):
        raise Unavailable(f"{LIBRARY.version()} is too old: it has no unified KV cache")
    return functions


def gguf_file(config: Config) -> Path:
    """The GGUF file with a model's weights. Raises Unavailable if there is none."""
    if config.name not in GGUF_FILES:
        raise Unavailable(f"needs a GGUF file, which only {', '.join(GGUF_FILES)} has")
    if config.decoder.rope_scaling is not None:
        raise Unavailable("runs without --rope-scaling only")
    try:
        return GGUF_FILES[config.name]()
    except InputError as error:
        raise Unavailable(str(error)) from None


class LlamaCpp:
    """llama.cpp with the weights of a GGUF file."""

    def __init__(self, path: Path) -> None:
        self.functions = library()
        self.log = _Log(self.functions)
        self.functions.llama_backend_init()
        parameters = self.functions.llama_model_default_params()
        self.model = self.functions.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise Unavailable(f"llama.cpp cannot load {path}: {self.log.errors()}")
        weakref.finalize(self, self.functions.llama_model_free, self.model)
        file_type = self.functions.llama_model_ftype(self.model)
        self.weights: str = self.functions.llama_ftype_name(file_type).decode()

    def decode_step(self, prompt: Tensor, suffixes: Tensor) -> Work:
        start, (batch, suffix) = len(prompt), suffixes.shape
        columns = suffixes.T.tolist()  # [S][B]
        rows = [
            [Row(ids[i], start + column, i, column == suffix - 1) for i in range(batch)]
            for column, ids in enumerate(columns)
        ]

        def prepare(settings: Settings) -> Callable[[], Tensor]:
            context = _Context(self, start + batch * suffix, batch, settings)
            context.read_prompt(prompt.tolist())
            context.share(batch)
            context.decode([row for step in rows[:-1] for row in step])

            def step() -> Tensor:
                context.decode(rows[-1])
                logits = context.logits(batch)
                for sequence in range(batch):
                    context.forget(sequence, start + suffix - 1)
                return logits

            return step

        return self._work(prepare)

    def prefill(self, prompt: Tensor) -> Work:
        ids = prompt.tolist()

        def prepare(settings: Settings) -> Callable[[], Tensor]:
            context = _Context(self, len(ids), 1, settings)

            def read() -> Tensor:
                context.forget(0, 0)
                context.read_prompt(ids)
                return context.logits(1)

            return read

        return self._work(prepare)

    def generator(
        self, prompts: Sequence[Sequence[int]], lengths: Sequence[Sequence[int]], temperature: float
    ) -> tuple[Generate, str]:
        pairs = list(zip(prompts, lengths, strict=True))
        tokens = max(len(prompt) + sum(many) for prompt, many in pairs)
        width = max(map(len, lengths))

        def prepare(settings: Settings) -> _Generator:
            return _Generator(_Context(self, tokens, width, settings), temperature)

        def once(generator: _Generator) -> None:
            for prompt, many in pairs:
                generator(prompt, many, lambda tokens: None)

        return self._fastest(prepare, once)

    def _work(self, prepare: Callable[[Settings], Callable[[], Tensor]]) -> Work:
        return Work(*self._fastest(prepare, lambda call: call()))

    def _fastest(
        self, prepare: Callable[[Settings], T], once: Callable[[T], object]
    ) -> tuple[T, str]:
        """What `prepare` makes of those settings with which `once` takes the least time."""
        best, least, chosen = None, float("inf"), SETTINGS[0]
        for settings in SETTINGS:
            made = prepare(settings)
            start = time.perf_counter()
            once(made)
            seconds = time.perf_counter() - start
            if seconds < least:
                best, least, chosen = made, seconds, settings
        assert best is not None
        return best, self._described(chosen)

    def _described(self, settings: Settings) -> str:
        flash = "" if settings.flash else "no "
        return f"{self.weights} weights, f16 KV, {flash}flash attention, ubatch {settings.ubatch}"


class _Context:
    """A llama.cpp context: room for the KV of `tokens`, of up to `sequences` sequences."""

    def __init__(self, peer: LlamaCpp, tokens: int, sequences: int, settings: Settings) -> None:
        self.functions, self.peer = peer.functions, peer  # the model must outlive the context
        most = self.functions.llama_max_parallel_sequences()
        if sequences > most:
            raise Unavailable(f"{sequences} sequences; at most {most} are supported")
        parameters = self.functions.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = tokens
        parameters.n_ubatch = max(settings.ubatch, sequences)  # a decode step is one pass
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = torch.get_num_threads()
        parameters.flash_attn_type = int(settings.flash)
        parameters.kv_unified = True
        self.pointer = self.functions.llama_init_from_model(peer.model, parameters)
        if not self.pointer:
            raise Unavailable(f"llama.cpp has no context of {tokens} tokens: {peer.log.errors()}")
        weakref.finalize(self, self.functions.llama_free, self.pointer)
        self.memory = self.functions.llama_get_memory(self.pointer)

    def read_prompt(self, ids: Sequence[int]) -> None:
        """Decode a prompt as sequence 0, up to the logits of its last token."""
        last = len(ids) - 1
        self.decode([Row(token, place, 0, place == last) for place, token in enumerate(ids)])

    def share(self, sequences: int) -> None:
        """Let sequences 1 and on share the KV of sequence 0."""
        for sequence in range(1, sequences):
            self.functions.llama_memory_seq_cp(self.memory, 0, sequence, -1, -1)

    def forget(self, sequence: int, start: int) -> None:
        """Remove a sequence's tokens from position `start` on."""
        self.functions.llama_memory_seq_rm(self.memory, sequence, start, -1)

    def decode(self, rows: Sequence[Row]) -> None:
        """Read tokens, and wait for their logits."""
        if not rows:
            return
        batch = self.functions.llama_batch_init(len(rows), 0, 1)
        try:
            batch.n_tokens = len(rows)
            for index, row in enumerate(rows):
                batch.token[index], batch.pos[index] = row.token, row.position
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, row.sequence
                batch.logits[index] = row.logits
            code = self.functions.llama_decode(self.pointer, batch)
        finally:
            self.functions.llama_batch_free(batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}: {self.peer.log.errors()}")
        self.functions.llama_synchronize(self.pointer)

    def logits(self, rows: int) -> Tensor:
        """The last step's logits [rows, vocab], in llama.cpp's memory: valid until the next one."""
        vocab = self.functions.llama_model_get_vocab(self.peer.model)
        size = self.functions.llama_vocab_n_tokens(vocab)
        pointer = self.functions.llama_get_logits(self.pointer)
        return torch.from_numpy(np.ctypeslib.as_array(pointer, shape=(rows, size)))


class _Generator:
    """Samples continuations with llama.cpp's own samplers."""

    def __init__(self, context: _Context, temperature: float) -> None:
        self.context, functions = context, context.functions
        self.sampler = functions.llama_sampler_chain_init(
            functions.llama_sampler_chain_default_params()
        )
        for sampler in (
            functions.llama_sampler_init_temp(temperature),
            functions.llama_sampler_init_dist(0),
        ):
            functions.llama_sampler_chain_add(self.sampler, sampler)
        weakref.finalize(self, functions.llama_sampler_free, self.sampler)

    def __call__(self, prompt: Sequence[int], lengths: Sequence[int], on_step: OnStep) -> None:
        context, sequences = self.context, range(len(lengths))
        context.functions.llama_memory_clear(context.memory, False)
        context.read_prompt(prompt)
        context.share(len(lengths))
        tokens = self._sampled(-1 for _ in sequences)  # all from the prompt's last token
        on_step(len(lengths))
        running = list(sequences)
        for done in range(1, max(lengths)):
            token_of = dict(zip(running, tokens, strict=True))
            running = [sequence for sequence in running if lengths[sequence] > done]
            position = len(prompt) + done - 1
            context.decode([Row(token_of[s], position, s, True) for s in running])
            tokens = self._sampled(range(len(running)))
            on_step(len(running))

    def _sampled(self, rows: Iterable[int]) -> list[int]:
        sample = self.context.functions.llama_sampler_sample
        return [sample(self.sampler, self.context.pointer, row) for row in rows]


class _Log:
    """Keeps llama.cpp's last error instead of its log on stderr."""

    def __init__(self, functions: ModuleType) -> None:
        self._last = "it does not say why"
        self._callback = functions.llama_log_callback(self._add)  # must outlive its registration
        functions.llama_log_set(self._callback, ctypes.c_void_p(0))
        _LOGS.append(self)

    def _add(self, level: int, text: bytes, _: Any) -> None:  # noqa: ANN401
        if level == ERROR:
            self._last = " ".join(text.decode(errors="replace").split())

    def errors(self) -> str:
        return self._last


_LOGS: list[_Log] = []  # llama.cpp calls the last one's callback until the process ends


def _check(device: torch.device) -> None:
    on_cpu(device)
    library()


def _load(model: Step3VL) -> LlamaCpp:
    return LlamaCpp(gguf_file(model.config))


GET = "pip install llama-cpp-python, which compiles it for minutes"
LIBRARY = Library("llama.cpp", GET, distribution("llama-cpp-python"), _check)
LLAMA_CPP = ModelPeer("llama.cpp", LIBRARY, gguf_file, _load)
