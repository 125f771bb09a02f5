"""tokenizer_config.json and its companions against transformers, and their mistakes."""

import json

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from model.errors import InputError
from model.text.tokenizer import Tokenizer

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TEXTS = [
    "a <mask> b<mask>\n<mask>  c",
    "<left>  <right>  x <left>",
    "the<word>the <word> the-<word>-",
    "Norm NORM norm <|end|>x<|end|> <s>the</s> the",
    " <new>the<|end|> <pad><tool> \n\n  the",
]


@pytest.fixture
def directory(tmp_path):
    """BPE that lower-cases, with added tokens of every flag and `the` as a plain token."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(["the the then them"] * 3, trainer)
    backend.add_tokens(
        [
            AddedToken("<mask>", lstrip=True, normalized=False, special=True),
            AddedToken("<left>", lstrip=True, normalized=False),
            AddedToken("<right>", rstrip=True, normalized=False),
            AddedToken("<word>", single_word=True, normalized=False),
            AddedToken("norm", normalized=True),
            AddedToken("<|end|>", special=True, normalized=False),
        ]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(directory, files):
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))


def typed(content, **flags):
    return {"__type": "AddedToken", "content": content, **flags}


def id_of(directory, token):
    return Backend.from_file(str(directory / "tokenizer.json")).token_to_id(token)


FILES = [
    {},
    {CONFIG: {"eos_token": "<|end|>", "bos_token": None, "add_bos_token": True}},
    {CONFIG: {"eos_token": typed("<|end|>", lstrip=False), "image_token": "<mask>"}},
    {CONFIG: {"extra_special_tokens": {"image_token": "<mask>", "box_token": "<new>"}}},
    {CONFIG: {"model_specific_special_tokens": {"box_token": "<new>"}, "pad_token": "<pad>"}},
    {CONFIG: {"additional_special_tokens": ["<tool>", "<mask>"], "eos_token": "<|end|>"}},
    {
        CONFIG: {
            "extra_special_tokens": ["<tool>", typed("<new>", special=True)],
            "unk_token": "the",
        }
    },
    {CONFIG: {"eos_token": "the"}},  # not an added token yet
    {CONFIG: {"eos_token": "<mask>"}, MAP: {"eos_token": "<|end|>", "bos_token": "<|end|>"}},
    {CONFIG: {}, MAP: {"eos_token": {"content": "<|end|>", "lstrip": False}}},
    {MAP: {"additional_special_tokens": ["<tool>"], "pad_token": "<pad>"}},
    {CONFIG: {"add_prefix_space": False, "clean_up_tokenization_spaces": True}},
]


@pytest.mark.judge
@pytest.mark.parametrize("files", FILES)
def test_equals_transformers(directory, files):
    """Guards special tokens that templates see, and tokens that these files add to the vocabulary:
    without them a template's `</s>` is spelled out. Every flag of an added token counts."""
    from transformers import PreTrainedTokenizerFast

    write(directory, files)
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    ours = Tokenizer.from_directory(directory)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.eos == (() if theirs.eos_token is None else (theirs.eos_token_id,))
    assert ours.added == {id: token.content for id, token in theirs.added_tokens_decoder.items()}
    assert {ours.added[id] for id in ours.special} == {
        token.content for token in theirs.added_tokens_decoder.values() if token.special
    }
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, special=False) == theirs._encode_without_added_tokens(text)


@pytest.mark.judge
def test_added_tokens_equal_transformers(directory):
    """Guards tokens and flags that only these files have; with added_tokens_decoder, the older
    files do not count."""
    from transformers import PreTrainedTokenizerFast

    size = Backend.from_file(str(directory / "tokenizer.json")).get_vocab_size()
    mask = id_of(directory, "<mask>")
    flags = {"lstrip": False, "rstrip": True, "normalized": False, "single_word": False}
    decoder = {
        str(mask): {"content": "<mask>", "special": False, **flags},
        str(size + 1): {"content": "<tool>", "special": False, **flags},
        str(size): {"content": "<new>", "special": True, **flags},
    }
    for files in (
        {
            CONFIG: {"added_tokens_decoder": decoder, "pad_token": "<mask>"},
            MAP: {"eos_token": "<mask>"},
        },
        {ADDED: {"<tool>": size + 1, "<new>": size}, MAP: {"pad_token": "<new>"}},
    ):
        write(directory, {CONFIG: {}, **files})
        theirs = PreTrainedTokenizerFast.from_pretrained(directory)
        ours = Tokenizer.from_directory(directory)
        assert ours.special_tokens == theirs.special_tokens_map
        assert {"<new>", "<tool>"} <= {*ours.added.values()}
        theirs_special = {id for id, token in theirs.added_tokens_decoder.items() if token.special}
        assert ours.special == theirs_special
        for text in TEXTS:
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


TOKEN_FORM = 'must be a token, such as "</s>" or {"content": "</s>"}, not'


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({CONFIG: []}, f"{CONFIG} must hold a JSON object"),
        ({CONFIG: {"eos_token": "\ud800"}}, f"{CONFIG} is not valid JSON: 'utf-8' codec"),
        ({CONFIG: {"eos_token": 5}}, f"{CONFIG}: eos_token {TOKEN_FORM} 5"),
        ({CONFIG: {"eos_token": {}}}, f"{CONFIG}: eos_token {TOKEN_FORM} {{}}"),
        ({CONFIG: {"pad_token": ["x"]}}, f"{CONFIG}: pad_token {TOKEN_FORM} ['x']"),
        ({CONFIG: {"image_token": {"id": 1}}}, f"{CONFIG}: image_token {TOKEN_FORM}"),
        ({MAP: {"eos_token": {"content": 1}}}, f"{MAP}: eos_token {TOKEN_FORM}"),
        ({MAP: []}, f"{MAP} must hold a JSON object"),
        ({CONFIG: {"extra_special_tokens": 5}}, "extra_special_tokens must be a list or an object"),
        ({CONFIG: {"extra_special_tokens": [5]}}, f"extra_special_tokens {TOKEN_FORM} 5"),
        ({CONFIG: {"eos_token": "<none>"}}, "eos_token '<none>' is not in the vocabulary"),
        ({CONFIG: {"split_special_tokens": True}}, "split_special_tokens True is not implemented"),
        ({CONFIG: {"add_prefix_space": True}}, "add_prefix_space True is not implemented"),
        ({CONFIG: {"fast_tokenizer_files": ["a"]}}, "fast_tokenizer_files ['a'] is not implem"),
        ({CONFIG: {"added_tokens_decoder": []}}, "added_tokens_decoder must be an object"),
        (
            {CONFIG: {"added_tokens_decoder": {"1": "a"}}},
            "added_tokens_decoder[1] must be an object",
        ),
        ({CONFIG: {"added_tokens_decoder": {"x": typed("a")}}}, "added_tokens_decoder[x]: invalid"),
        (
            {CONFIG: {"added_tokens_decoder": {"1": typed("a", lstrip="x")}}},
            "added_tokens_decoder[1]: ",
        ),
        (
            {CONFIG: {"added_tokens_decoder": {"7": typed("<mask>")}}},
            f"{CONFIG} gives '<mask>' the id 7; by tokenizer.json it is 26",
        ),
        ({ADDED: {"<new>": "7"}}, f"{ADDED}: the id of '<new>' must be an integer, not '7'"),
        ({ADDED: {"<new>": 7}}, f"{ADDED} gives '<new>' the id 7"),
    ],
)
def test_mistakes(directory, files, complaint):
    """Guards against tracebacks, and against other ids than the files ask for: the error names the
    file and the entry in one line."""
    write(directory, files)
    with pytest.raises(InputError) as error:
        Tokenizer.from_directory(directory)
    assert complaint in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda file: file["model"].update(dropout=0.5), "dropout 0.5 would draw ids at random"),
        (lambda file: file["model"].update(unk_token="<u>"), "unk_token '<u>' is not in the vocab"),
        (
            lambda file: file.update(
                model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
            ),
            "is not byte-level BPE",
        ),
    ],
)
def test_tokenizers_that_are_not_implemented(directory, edit, complaint):
    """Guards against ids that differ from call to call, or those of another kind of tokenizer."""
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=complaint):
        Tokenizer.from_directory(directory)
