"""The tokenizer that a GGUF file's metadata describe, checked without the tokenizers library.

What a key means is taken from llama.cpp (src/llama-vocab.cpp). A key that would change token ids or
prompts and is not implemented raises an InputError that names it.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.errors import InputError, shown

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # llama.cpp's token types
_TYPES = (1, UNKNOWN, CONTROL, USER_DEFINED, 5)  # 1 is normal, 5 unused; 6 is a byte

# Whether each kind (model, pre) splits numbers into digits, before GPT-2's split into words.
_SPLITS_DIGITS = {("gpt2", "smollm"): True, ("gpt2", "gpt-2"): False}

_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"  # the default; other templates are TEMPLATE.name
_REQUIRED = ("model", "pre", "tokens", "token_type", "merges")
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_SPECIAL_TOKENS = {  # a template's name of each token
    "bos_token_id": "bos_token",
    "eos_token_id": "eos_token",
    "unknown_token_id": "unk_token",
    "padding_token_id": "pad_token",
}
# The only implemented value of each key; an absent key means that value.
_FIXED: dict[str, object] = {
    "add_bos_token": False,
    "add_eos_token": False,
    "add_sep_token": False,
    "add_space_prefix": False,
    "remove_extra_whitespaces": False,
    "precompiled_charsmap": [],
    "suppress_tokens": [],
}
# Keys of other kinds of tokenizer, and ids that neither prompts nor generation use.
_UNUSED = {"scores", "token_type_count", "prefix_token_id", "suffix_token_id", "middle_token_id"}
_UNUSED |= {f"{name}_token_id" for name in ("seperator", "cls", "mask")}  # spelt as in files
_UNUSED |= {f"fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")}


@dataclass(frozen=True)
class GGUFTokenizer:
    """The tables of a byte-level BPE tokenizer; `types` has llama.cpp's type of every token.

    `eos` are the ids that end a turn; `special_tokens` maps bos_token, eos_token, unk_token and
    pad_token to their texts, where the file has them.
    """

    tokens: list[str]
    types: list[int]
    merges: list[tuple[str, str]]
    splits_digits: bool
    eos: tuple[int, ...]
    special_tokens: dict[str, str]
    chat_templates: dict[str, str]  # by name


def read_gguf_tokenizer(metadata: Mapping[str, Any]) -> GGUFTokenizer:
    """Read the keys of a GGUF file's metadata that begin with `tokenizer.`; ignore others.

    Raises InputError for a key that is missing, wrong or not implemented.
    """
    fields = {k.removeprefix(_PREFIX): v for k, v in metadata.items() if k.startswith(_PREFIX)}
    missing = [_PREFIX + key for key in _REQUIRED if key not in fields]
    if missing:
        raise InputError(f"there is no metadata key {', '.join(missing)}")
    splits_digits = _read_kind(fields["model"], fields["pre"])
    for key, value in fields.items():
        _check_implemented(key, value)
    tokens, types = _read_tokens(fields)
    keys = dict.fromkeys((*_ENDS, *_SPECIAL_TOKENS))
    ids = {key: _read_id(key, fields[key], tokens) for key in keys if key in fields}
    return GGUFTokenizer(
        tokens,
        types,
        _read_merges(fields, set(tokens)),
        splits_digits,
        eos=tuple(dict.fromkeys(ids[key] for key in _ENDS if key in ids)),
        special_tokens={name: tokens[ids[k]] for k, name in _SPECIAL_TOKENS.items() if k in ids},
        chat_templates=_read_chat_templates(metadata),
    )


def _read_kind(model: object, pre: object) -> bool:
    for kind, splits_digits in _SPLITS_DIGITS.items():
        if (model, pre) == kind:
            return splits_digits
    kinds = " and ".join("/".join(kind) for kind in _SPLITS_DIGITS)
    raise InputError(
        f"{_PREFIX}model and .pre are {shown(model)} and {shown(pre)}; only {kinds} are implemented"
    )


def _check_implemented(key: str, value: object) -> None:
    if key in _FIXED and value != _FIXED[key]:
        raise InputError(f"{_PREFIX}{key} is {shown(value)}; only {_FIXED[key]!r} is implemented")
    if key not in {*_REQUIRED, *_ENDS, *_SPECIAL_TOKENS, *_FIXED, *_UNUSED}:
        raise InputError(f"{_PREFIX}{key} is {shown(value)}; this key is not implemented")


def _read_tokens(fields: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    tokens, types = _list_of(fields, "tokens", str), _list_of(fields, "token_type", int)
    if len(types) != len(tokens):
        raise InputError(f"{_PREFIX}token_type has {len(types)} items for {len(tokens)} tokens")
    unknown = sorted(set(types) - set(_TYPES))
    if unknown:
        raise InputError(f"{_PREFIX}token_type {unknown[0]} is not implemented; 1 to 5 are")
    repeated = [token for token, count in Counter(tokens).items() if count > 1]
    if repeated:
        raise InputError(f"{_PREFIX}tokens has {shown(repeated[0])} more than once")
    return tokens, types


def _read_merges(fields: Mapping[str, Any], vocab: set[str]) -> list[tuple[str, str]]:
    merges = []
    for merge in _list_of(fields, "merges", str):
        left, _, right = merge.partition(" ")
        if not vocab.issuperset((left, right, left + right)):
            raise InputError(
                f"{_PREFIX}merges has {shown(merge)}; a merge must be two tokens with a space"
                " between them, which make up a third token"
            )
        merges.append((left, right))
    return merges


def _read_id(key: str, value: object, tokens: list[str]) -> int:
    if type(value) is not int or not 0 <= value < len(tokens):
        raise InputError(
            f"{_PREFIX}{key} is {shown(value)}; it must be an integer from 0 to"
            f" {len(tokens) - 1}, the last token"
        )
    return value


def _read_chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    templates = {}
    for key, template in metadata.items():
        if key == _TEMPLATE or key.startswith(f"{_TEMPLATE}."):
            if not isinstance(template, str):
                raise InputError(f"{key} is {shown(template)}; it must be a string")
            templates[key.removeprefix(_TEMPLATE).removeprefix(".") or "default"] = template
    return templates


def _list_of(fields: Mapping[str, Any], key: str, kind: type) -> list:
    values = fields[key]
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        words = {str: "strings", int: "integers"}[kind]
        raise InputError(f"{_PREFIX}{key} is {shown(values)}; it must be an array of {words}")
    return values
