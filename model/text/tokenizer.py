"""Byte-level BPE tokenizer: text to token ids and back. All models of this project use this kind.

The `tokenizers` library does the BPE; it is imported where it is used, since a GPU node may lack
it. This file reads its tables and decodes, which must also work token by token.
"""

import json
from collections.abc import Iterable, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernels.runtime.arithmetic import cdiv
from model.config import Config
from model.errors import STOPS, InputError, shown
from model.text.chat_template import THINKING_CHATML
from model.text.files import check_target, read_text
from model.text.gguf_tokenizer import CONTROL, UNKNOWN, USER_DEFINED, read_gguf_tokenizer
from model.text.tokenizer_config import TokenizerConfig

if TYPE_CHECKING:
    import tokenizers

# Some tokenizers flag these as special, but they are part of a model's answer.
THINK_MARKERS = ("<think>", "</think>")


class Tokenizer:
    """A byte-level BPE vocabulary, with the chat templates and special tokens of its files.

    `chat_templates` are jinja2 sources by name; `special_tokens` are texts by name (bos_token,
    eos_token, ...), which templates may write; `eos` are the ids that end a turn according to the
    tokenizer's files (the model's are in its Config); `added` maps the id of every added token to
    its text; `special` has the ids of the added tokens that are control tokens, not text.
    """

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        *,
        eos: tuple[int, ...] = (),
        chat_template: str | Mapping[str, str] | None = None,
        special_tokens: Mapping[str, str] = {},
    ) -> None:
        """`chat_template` is the only template, called default, or several by name."""
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self.eos = eos
        named = {"default": chat_template} if isinstance(chat_template, str) else chat_template
        self.chat_templates = dict(named or {})
        self.special_tokens = dict(special_tokens)
        self.added = {id: token.content for id, token in added.items()}
        self.special = frozenset(
            id
            for id, token in added.items()
            if token.special and token.content not in THINK_MARKERS
        )

    @property
    def chat_template(self) -> str | None:
        """The default chat template, None if there is no template at all.

        Raises InputError if there are only templates of other names.
        """
        if self.chat_templates and "default" not in self.chat_templates:
            raise InputError(
                "none of this model's chat templates is the default; choose one with"
                f" --chat-template: {', '.join(sorted(self.chat_templates))}"
            )
        return self.chat_templates.get("default")

    @staticmethod
    def from_directory(path: str | Path) -> "Tokenizer":
        """The tokenizer in a checkpoint's directory: `tokenizer.json`, and if present
        `tokenizer_config.json` and its companions (tokenizer_config.py, chat_template.py).

        Raises InputError for files that are missing, damaged, not byte-level BPE, or ask for what
        is not implemented.
        """
        import tokenizers

        path = Path(path)
        file = path / "tokenizer.json"
        text = read_text(file)
        if text is None:
            raise InputError(f"{file} cannot be read: No such file")
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except STOPS:
            raise
        except BaseException as error:  # also the panics of Rust code
            raise InputError(f"{file} is damaged: {error}") from None
        if not (
            isinstance(backend.decoder, tokenizers.decoders.ByteLevel)
            and isinstance(backend.model, tokenizers.models.BPE)
        ):
            raise InputError(f"{file} is not byte-level BPE, the only kind that is implemented")
        if backend.model.dropout:
            raise InputError(f"{file}: dropout {backend.model.dropout} would draw ids at random")
        unknown = backend.model.unk_token
        if unknown is not None and backend.token_to_id(unknown) is None:
            raise InputError(f"{file}: unk_token {shown(unknown)} is not in the vocabulary")
        config = TokenizerConfig.read(path)
        config.add_tokens(backend, path)
        eos = config.special_tokens.get("eos_token")
        eos_id = None if eos is None else backend.token_to_id(eos)
        return Tokenizer(
            backend,
            eos=() if eos_id is None else (eos_id,),
            chat_template=config.chat_templates,
            special_tokens=config.special_tokens,
        )

    def save(self, path: str | Path) -> None:
        """Write the files that `from_directory` reads into directory `path`.

        Raises InputError if that fails.
        """
        path = Path(path)
        settings: dict[str, object] = {**self.special_tokens}
        if self.eos:
            settings["eos_token"] = self._backend.id_to_token(self.eos[0])
        settings["chat_template"] = [
            {"name": name, "template": template} for name, template in self.chat_templates.items()
        ]
        for name in ("tokenizer.json", "tokenizer_config.json"):
            check_target(path / name)
        try:
            self._backend.save(str(path / "tokenizer.json"))
            (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        except Exception as error:  # the library's errors have no type of their own
            raise InputError(f"cannot write the tokenizer into {path}: {error}") from None

    @staticmethod
    def from_gguf_metadata(metadata: Mapping[str, Any]) -> "Tokenizer":
        """The tokenizer of a GGUF file, from its metadata as Python values by key.

        Raises InputError for a key that is missing, wrong or not implemented.
        """
        from tokenizers import AddedToken, pre_tokenizers

        described = read_gguf_tokenizer(metadata)
        split: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.ByteLevel(add_prefix_space=False)
        ]
        if described.splits_digits:
            split.insert(0, pre_tokenizers.Digits(individual_digits=True))
        backend = _bpe(
            {token: id for id, token in enumerate(described.tokens)},
            described.merges,
            pre_tokenizers.Sequence(split),
        )
        backend.add_tokens(
            [
                AddedToken(token, special=type != USER_DEFINED, normalized=False)
                for token, type in zip(described.tokens, described.types, strict=True)
                if type in (UNKNOWN, CONTROL, USER_DEFINED)
            ]
        )
        return Tokenizer(
            backend,
            eos=described.eos,
            chat_template=described.chat_templates,
            special_tokens=described.special_tokens,
        )

    @staticmethod
    def byte_level(config: Config) -> "Tokenizer":
        """One token per byte, for presets with random weights.

        Special tokens have the ids of `config.tokens`; `<|endoftext|>` and `<|im_end|>` are the
        first two of `eos`, `<|im_start|>` precedes `<|im_end|>`. All other ids read `<id>`, so that
        any output of random weights can be shown.
        """
        from tokenizers import AddedToken, pre_tokenizers

        ids = config.tokens
        special = {
            "<|endoftext|>": ids.eos[0],
            "<|im_start|>": ids.eos[1] - 1,
            "<|im_end|>": ids.eos[1],
            "<im_patch>": ids.im_patch,
            "<im_start>": ids.im_start,
            "<im_end>": ids.im_end,
            "<patch_start>": ids.patch_start,
            "<patch_end>": ids.patch_end,
            "<patch_newline>": ids.patch_newline,
        }
        vocab = {f"<{id}>": id for id in range(256, config.decoder.vocab_size)}
        for text, id in special.items():
            del vocab[f"<{id}>"]
            vocab[text] = id
        vocab |= _bytes_of_chars()
        backend = _bpe(vocab, [], pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        backend.add_tokens([AddedToken(text, special=True, normalized=False) for text in special])
        return Tokenizer(
            backend,
            eos=ids.eos,
            chat_template=THINKING_CHATML,
            special_tokens={"eos_token": "<|endoftext|>"},
        )

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`.

        With `special`, for rendered templates, the texts of added tokens become their ids. Without,
        they are encoded like any other text. No begin or end token is added. Other threads may run
        meanwhile.
        """
        if special:  # `encode` would hold the GIL, and take twice as long, for offsets
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=False)
            return encoding.ids
        if self._backend.normalizer is not None:
            text = self._backend.normalizer.normalize_str(text)
        words = [text]
        if self._backend.pre_tokenizer is not None:
            words = [word for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in self._backend.model.tokenize(word)]

    def fewest_tokens(self, text: str) -> int:
        """A number that `encode(text)` reaches or exceeds, found without tokenising: as if every
        token were the longest. 0 for vocabularies whose tokens may be texts of any length."""
        if not self._longest:
            return 0
        if self._backend.normalizer is not None:
            text = self._backend.normalizer.normalize_str(text)
        return cdiv(len(text.encode()), self._longest)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    @cached_property
    def missing_bytes(self) -> frozenset[int]:
        """The bytes that no token writes: `encode` drops them without an error."""
        if self._backend.model.unk_token is not None:
            return frozenset()
        chars = _bytes_of_chars().items()
        return frozenset(byte for char, byte in chars if self._backend.token_to_id(char) is None)

    @cached_property
    def _longest(self) -> int:
        """Bytes of the longest token; 0 if one may be of any length, or bytes may be dropped."""
        added = self._backend.get_added_tokens_decoder().values()
        if self._backend.model.unk_token is not None or any(t.lstrip or t.rstrip for t in added):
            return 0  # it takes all unknown characters, or all white space, next to it
        probe, split = " \t\n 1234, abc  d'Re --- \xe9\u4e2d\n", self._backend.pre_tokenizer
        words = split.pre_tokenize_str(probe) if split else []
        if sum(len(word) for word, _ in words) != len(probe.encode()):
            return 0  # not a character per byte
        longest_added = max((len(text.encode()) for text in self.added.values()), default=0)
        return max(longest_added, *map(len, self._backend.get_vocab(with_added_tokens=False)))

    def token_bytes(self, id: int) -> bytes:
        """The bytes of token `id`: none for special tokens and for ids without a token."""
        if id in self.special:
            return b""
        if id in self.added:
            return self.added[id].encode()
        text, chars = self._backend.id_to_token(id) or "", _bytes_of_chars()
        # If a character is outside the byte alphabet, the file holds this token's plain text.
        return bytes(chars[c] for c in text) if chars.keys() >= set(text) else text.encode()


def _bpe(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    split: "tokenizers.pre_tokenizers.PreTokenizer",
) -> "tokenizers.Tokenizer":
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = split
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


@lru_cache
def _bytes_of_chars() -> dict[str, int]:
    """GPT-2's alphabet: the character that writes each byte in a byte-level vocabulary.

    Printable Latin-1 characters write their own byte; the other 68 get U+0100 and up, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + rank): byte for rank, byte in enumerate(others)
    }
