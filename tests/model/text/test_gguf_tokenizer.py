"""Tests of what a GGUF file's metadata say about the tokenizer: read, or refused by name."""

import pytest

from model.errors import InputError
from model.text.gguf_tokenizer import read_gguf_tokenizer
from model.text.tokenizer import Tokenizer, _bytes_of_chars

TOKENS = ["<|endoftext|>", "<|im_end|>", "<unk>", "<user>", *_bytes_of_chars(), "hi"]
METADATA = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 2, 4] + [1] * (len(TOKENS) - 4),
    "tokenizer.ggml.merges": ["h i"],
    "tokenizer.ggml.eos_token_id": 1,
}


def metadata(**changes):
    """METADATA with `changes` to keys `tokenizer.ggml.NAME`; None omits a key."""
    changed = METADATA | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    return {key: value for key, value in changed.items() if value is not None}


def test_token_types_mean_what_they_mean_to_llama_cpp():
    """Guards against an unknown token that shows in text, or a user-defined one that does not."""
    tokenizer = Tokenizer.from_gguf_metadata(METADATA)
    ids = tokenizer.encode("<unk>hi<user><|im_end|>")
    assert ids == [2, len(TOKENS) - 1, 3, 1]
    assert tokenizer.decode(ids) == "hi<user>"
    assert tokenizer.special == {0, 1, 2}


def test_digits_are_split_by_the_kind():
    """Guards against SmolLM's split for GPT-2's tokenizer: with a merge of 1 and 2 they differ."""
    tables = {"tokens": [*TOKENS[:-1], "12"], "merges": ["1 2"]}
    lengths = {}
    for pre in ("smollm", "gpt-2"):
        lengths[pre] = len(Tokenizer.from_gguf_metadata(metadata(pre=pre, **tables)).encode("12"))
    assert lengths == {"smollm": 2, "gpt-2": 1}


def test_ends_are_the_union_of_all_keys():
    """Guards against generating past <|eot_id|> where eos is <|end_of_text|>, and repeated ids."""
    read = read_gguf_tokenizer(metadata(eot_token_id=0, eom_token_id=1))
    assert read.eos == (1, 0)
    assert Tokenizer.from_gguf_metadata(metadata(eot_token_id=0)).eos == (1, 0)
    assert read_gguf_tokenizer(metadata(eos_token_id=None)).eos == ()


def test_special_tokens_have_the_names_of_templates():
    """Guards against templates that write another token's text as bos_token or eos_token."""
    assert Tokenizer.from_gguf_metadata(METADATA).special_tokens == {"eos_token": "<|im_end|>"}
    ids = {"bos_token_id": 0, "unknown_token_id": 2, "padding_token_id": 3}
    assert Tokenizer.from_gguf_metadata(metadata(**ids)).special_tokens == {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<unk>",
        "pad_token": "<user>",
    }


def test_chat_templates_by_name():
    """Guards against a template for tools as the default, and ignored templates."""
    key = "tokenizer.chat_template"
    named = {f"{key}.tool_use": "T", "tokenizer.chat_templates": ["tool_use"]}
    assert read_gguf_tokenizer(METADATA).chat_templates == {}
    assert read_gguf_tokenizer(METADATA | named).chat_templates == {"tool_use": "T"}
    both = read_gguf_tokenizer(METADATA | named | {key: "D"}).chat_templates
    assert both == {"tool_use": "T", "default": "D"}


@pytest.mark.parametrize(
    ("key", "value", "neutral"),
    [
        ("add_bos_token", True, False),
        ("add_eos_token", True, False),
        ("add_sep_token", True, False),
        ("add_space_prefix", True, False),
        ("remove_extra_whitespaces", True, False),
        ("precompiled_charsmap", [0, 1], []),
        ("suppress_tokens", [5], []),
    ],
)
def test_other_ids_are_refused_by_name(key, value, neutral):
    """Guards against prompts that lack a token, or have one too many, silently."""
    with pytest.raises(InputError, match=rf"tokenizer\.ggml\.{key} is .*; only .* is implemented"):
        read_gguf_tokenizer(metadata(**{key: value}))
    assert read_gguf_tokenizer(metadata(**{key: neutral})) == read_gguf_tokenizer(METADATA)


def test_every_key_is_read_or_refused():
    """Guards against a key of the package gguf that is ignored although it has a meaning."""
    keys = pytest.importorskip("gguf").Keys.Tokenizer
    names = [key for key in vars(keys).values() if str(key).startswith("tokenizer.ggml.")]
    refused = set()
    for name in names:
        try:
            read_gguf_tokenizer(METADATA | {name: "another"})
        except InputError as error:
            assert "'another'" in str(error)
            refused.add(name)
    accepted = {name.removeprefix("tokenizer.ggml.") for name in {*names} - refused}
    assert {name for name in accepted if not name.endswith("_token_id")} == {
        "scores",
        "token_type_count",
    }
    assert not accepted & {f"{e}_token_id" for e in ("bos", "eos", "eot", "eom", "unknown")}
    with pytest.raises(InputError, match="tokenizer.ggml.new is 5; this key is not implemented"):
        read_gguf_tokenizer(metadata(new=5))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pre": None, "merges": None}, "no metadata key tokenizer.ggml.pre, tokenizer.ggml.merg"),
        ({"model": "llama"}, "'llama' and 'smollm'; only gpt2/smollm and gpt2/gpt-2 are"),
        ({"model": 5}, "are 5 and 'smollm'"),
        ({"pre": ["gpt-2"]}, r"are 'gpt2' and \['gpt-2'\]"),
        ({"tokens": 5}, "tokens is 5; it must be an array of strings"),
        ({"tokens": "abc"}, "tokens is 'abc'; it must be an array of strings"),
        ({"tokens": [1, 2]}, r"tokens is \[1, 2\]; it must be an array of strings"),
        ({"tokens": TOKENS[1:]}, "token_type has 261 items for 260 tokens"),
        ({"tokens": ["a", *TOKENS[1:]]}, "tokens has 'a' more than once"),
        ({"token_type": 5}, "token_type is 5; it must be an array of integers"),
        ({"token_type": [3]}, "token_type has 1 items for 261 tokens"),
        ({"token_type": ["x"] * 261}, "token_type is .*; it must be an array of integers"),
        ({"token_type": [True] * 261}, "token_type is .*; it must be an array of integers"),
        ({"token_type": [6] * 261}, "token_type 6 is not implemented; 1 to 5 are"),
        ({"token_type": [-1] * 261}, "token_type -1 is not implemented"),
        ({"merges": "h i"}, "merges is 'h i'; it must be an array of strings"),
        ({"merges": [1]}, "merges is .*; it must be an array of strings"),
        ({"merges": ["h"]}, "merges has 'h'; a merge must be two tokens"),
        ({"merges": ["h i j"]}, "merges has 'h i j'; a merge must be two tokens"),
        ({"merges": [" h"]}, "merges has ' h'; a merge must be two tokens"),
        ({"merges": ["h ö"]}, "merges has 'h ö'; a merge must be two tokens"),
        ({"merges": ["i h"]}, "merges has 'i h'; .* make up a third"),
        ({"eos_token_id": 261}, "eos_token_id is 261; it must be an integer from 0 to 260"),
        ({"eot_token_id": -1}, "eot_token_id is -1; it must be an integer"),
        ({"eom_token_id": "2"}, "eom_token_id is '2'; it must be an integer"),
        ({"eos_token_id": [2]}, r"eos_token_id is \[2\]; it must be an integer"),
        ({"eos_token_id": True}, "eos_token_id is True; it must be an integer"),
        ({"bos_token_id": 2**32 - 1}, "bos_token_id is 4294967295; it must be an integer"),
    ],
)
def test_wrong_values_are_named(changes, words):
    """Guards against a traceback for a table of another type or length, or one that disagrees."""
    with pytest.raises(InputError, match=words) as error:
        read_gguf_tokenizer(metadata(**changes))
    assert len(str(error.value)) < 300


def test_wrong_templates_are_named():
    """Guards against a traceback when the template is rendered."""
    with pytest.raises(InputError, match="tokenizer.chat_template is 5; it must be a string"):
        read_gguf_tokenizer(METADATA | {"tokenizer.chat_template": 5})
