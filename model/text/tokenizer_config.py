"""tokenizer_config.json and its older companions: special tokens, and tokens that they add.

They are read as transformers 5 does (its tokenization_utils_base.py and _tokenizers.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import InputError, shown
from model.text.chat_template import read_chat_templates
from model.text.files import read_json

if TYPE_CHECKING:
    import tokenizers

FILE, MAP_FILE, ADDED_FILE = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRAS = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
# Settings that change the ids, with the only value that is implemented.
FIXED = {"split_special_tokens": False, "fast_tokenizer_files": None, "add_prefix_space": False}


@dataclass(frozen=True)
class TokenizerConfig:
    """`special_tokens` by name, such as bos_token; other special tokens; chat templates by name.

    `added` are tokens by id that the vocabulary must hold, with their flags; `added_from` is the
    file that says so.
    """

    special_tokens: dict[str, str]
    extra_special_tokens: tuple[str, ...]
    added: "dict[int, tokenizers.AddedToken]"
    added_from: str
    chat_templates: dict[str, str]

    @staticmethod
    def read(path: Path) -> "TokenizerConfig":
        """The settings in a checkpoint's directory; every file may be missing.

        Raises InputError for a damaged file, a wrong type, and what is not implemented.
        """
        file = path / FILE
        settings = read_json(file) or {}
        for key, value in FIXED.items():
            if settings.get(key, value) != value:
                raise InputError(f"{file}: {key} {shown(settings[key])} is not implemented")
        special, extra = _special_tokens(settings, file)
        if "added_tokens_decoder" in settings:
            added_from = FILE
            added = _added(settings["added_tokens_decoder"], f"{file}: added_tokens_decoder")
        else:  # files of older releases
            more_special, more_extra = _special_tokens(
                read_json(path / MAP_FILE) or {}, path / MAP_FILE
            )
            special, extra = special | more_special, extra | more_extra
            added_from = ADDED_FILE
            added = _older_added(path / ADDED_FILE, {*special.values(), *extra})
        templates = read_chat_templates(path, settings)
        return TokenizerConfig(special, tuple(extra), added, added_from, templates)

    def add_tokens(self, backend: "tokenizers.Tokenizer", path: Path) -> None:
        """Add the tokens that `backend`, from tokenizer.json in `path`, lacks or flags otherwise.

        Raises InputError if one would get another id, or there is no eos_token in the vocabulary.
        """
        from tokenizers import AddedToken

        eos = self.special_tokens.get("eos_token")
        if eos is not None and backend.token_to_id(eos) is None and not self._adds(eos):
            raise InputError(f"{path}: eos_token {shown(eos)} is not in the vocabulary")
        # Compared by their repr, which has all flags.
        known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
        new = [token for _, token in sorted(self.added.items()) if repr(token) not in known]
        texts = {token.content for token in (*backend.get_added_tokens_decoder().values(), *new)}
        specials = dict.fromkeys([*self.special_tokens.values(), *self.extra_special_tokens])
        new += [AddedToken(text, special=True) for text in specials if text not in texts]
        for token in new:
            token.special = token.special or token.content in self.special_tokens.values()
        backend.add_tokens(new)
        for id, token in self.added.items():
            if backend.token_to_id(token.content) != id:
                raise InputError(
                    f"{path / self.added_from} gives {shown(token.content)} the id {id}; by"
                    f" tokenizer.json it is {backend.token_to_id(token.content)}"
                )

    def _adds(self, text: str) -> bool:
        return any(token.content == text for token in self.added.values())


def _special_tokens(settings: dict, file: Path) -> tuple[dict[str, str], dict[str, None]]:
    """The named special tokens, and the others as keys.

    Every entry `..._token` that is a text is a named token, such as image_token.
    """
    named = {
        key: _text(value, f"{file}: {key}")
        for key, value in settings.items()
        if value is not None
        if key in NAMES or (key.endswith("_token") and isinstance(value, str | dict))
    }
    others: dict[str, None] = {}
    for key in EXTRAS:
        value, where = settings.get(key), f"{file}: {key}"
        if isinstance(value, dict):
            named |= {name: _text(text, where) for name, text in value.items()}
        elif isinstance(value, list):
            others |= dict.fromkeys(_text(text, where) for text in value)
        elif value is not None:
            raise InputError(f"{where} must be a list or an object of tokens, not {shown(value)}")
    return named, others


def _text(value: object, where: str) -> str:
    """The text of a token, which is a string or an object."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise InputError(
            f'{where} must be a token, such as "</s>" or {{"content": "</s>"}}, not {shown(value)}'
        )
    return text


def _added(entries: object, where: str) -> "dict[int, tokenizers.AddedToken]":
    from tokenizers import AddedToken

    if not isinstance(entries, dict):
        raise InputError(f"{where} must be an object of tokens by id, not {shown(entries)}")
    added = {}
    for id, fields in entries.items():
        text = _text(fields, f"{where}[{id}]")
        if not isinstance(fields, dict):
            raise InputError(f"{where}[{id}] must be an object, not {shown(text)}")
        try:
            added[int(id)] = AddedToken(text, **{k: fields[k] for k in FLAGS if k in fields})
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{where}[{id}]: {error}") from None
    return added


def _older_added(file: Path, special: Iterable[str]) -> "dict[int, tokenizers.AddedToken]":
    """added_tokens.json: ids by token."""
    from tokenizers import AddedToken

    entries: dict[str, Any] = read_json(file) or {}
    for text, id in entries.items():
        if type(id) is not int or id < 0:
            raise InputError(f"{file}: the id of {shown(text)} must be an integer, not {shown(id)}")
    return {
        id: AddedToken(text, special=text in special, normalized=text not in special)
        for text, id in entries.items()
    }
