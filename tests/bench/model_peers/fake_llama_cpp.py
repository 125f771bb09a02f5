"""A stand-in for the package llama_cpp: it records its calls, and its logits are its tokens."""

import ctypes
from collections.abc import Callable
from types import SimpleNamespace

VOCAB = 8


class FakeLlamaCpp:
    """The functions that the peer calls. `calls` has a tuple for each that changes the KV:
    ("decode", [(token, position, sequence, logits)...]), ("copy", to), ("remove", sequence, from),
    ("clear",). on_decode: called by each decode, with its context's parameters"""

    llama_context_params = SimpleNamespace(kv_unified=None)

    def __init__(self, on_decode: Callable[[SimpleNamespace], None] = lambda parameters: None):
        self.calls: list[tuple] = []
        self.contexts: list[SimpleNamespace] = []
        self.freed: list[object] = []
        self.on_decode = on_decode
        self.code = 0
        self.loads = True
        self.log: Callable = lambda *arguments: None

    def __getattr__(self, name: str):
        if name.startswith("llama_"):
            return lambda *arguments: None
        raise AttributeError(name)

    def llama_log_callback(self, function: Callable):
        return function

    def llama_log_set(self, callback: Callable, _: object):
        self.log = callback

    def llama_model_load_from_file(self, path: bytes, parameters: object):
        if self.loads:
            return "model"
        self.log(4, b"unknown\narchitecture\n", None)
        return None

    def llama_model_ftype(self, model: str):
        return 3

    def llama_ftype_name(self, file_type: int):
        return b"Q4_1"

    def llama_max_parallel_sequences(self):
        return 256

    def llama_context_default_params(self):
        return SimpleNamespace()

    def llama_init_from_model(self, model: str, parameters: SimpleNamespace):
        self.contexts.append(parameters)
        return parameters

    def llama_free(self, context: SimpleNamespace):
        self.freed.append(context)

    def llama_batch_init(self, tokens: int, embedding: int, sequences: int):
        names = ("token", "pos", "n_seq_id", "logits")
        batch = SimpleNamespace(**{name: [None] * tokens for name in names})
        batch.seq_id = [[None] for _ in range(tokens)]
        return batch

    def llama_decode(self, context: SimpleNamespace, batch: SimpleNamespace):
        self.on_decode(context)
        columns = batch.token, batch.pos, [ids[0] for ids in batch.seq_id], batch.logits
        rows = list(zip(*columns, strict=True))
        assert len(rows) == batch.n_tokens <= context.n_batch
        assert batch.n_seq_id == [1] * len(rows)
        self.calls.append(("decode", rows))
        return self.code

    def llama_memory_seq_cp(self, memory: None, source: int, target: int, start: int, end: int):
        assert (source, start, end) == (0, -1, -1)
        self.calls.append(("copy", target))

    def llama_memory_seq_rm(self, memory: None, sequence: int, start: int, end: int):
        assert end == -1
        self.calls.append(("remove", sequence, start))

    def llama_memory_clear(self, memory: None, data: bool):
        self.calls.append(("clear",))

    def llama_vocab_n_tokens(self, vocab: None):
        return VOCAB

    def llama_get_logits(self, context: SimpleNamespace):
        """A row per token of the last batch whose logits were wanted: the token in each column."""
        rows = self._rows_with_logits()
        values = [float(token) for token, *_ in rows for _ in range(VOCAB)]
        self._logits = (ctypes.c_float * len(values))(*values)
        return ctypes.cast(self._logits, ctypes.POINTER(ctypes.c_float))

    def llama_sampler_sample(self, sampler: None, context: SimpleNamespace, row: int):
        """The row's token plus one."""
        return self._rows_with_logits()[row][0] + 1

    def _rows_with_logits(self):
        rows = [call for call in self.calls if call[0] == "decode"][-1][1]
        return [row for row in rows if row[3]]
