"""Which chat templates a checkpoint's files provide, against transformers, and mistakes in them."""

import json
import os

import pytest

from model.errors import InputError
from model.text.prompt import build_prompt
from model.text.tokenizer import Tokenizer
from tests.model.text.test_chat_template import STRINGS, backend, user
from tests.model.text.test_prompt import TINY


@pytest.fixture
def directory(tmp_path):
    Tokenizer(Tokenizer.byte_level(TINY)._backend).save(tmp_path)
    return tmp_path


def write(directory, files):
    for name, content in files.items():
        file = directory / name
        file.parent.mkdir(exist_ok=True)
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content))


def named(**templates):
    return {"chat_template": [{"name": n, "template": t} for n, t in templates.items()]}


CONFIG_FILE = "tokenizer_config.json"
FOLDER = "additional_chat_templates"
SOURCES = [
    ({}, {}),
    ({CONFIG_FILE: {"chat_template": "C"}}, {"default": "C"}),
    ({CONFIG_FILE: {"chat_template": None}}, {}),
    ({CONFIG_FILE: named(tools="U", default="C")}, {"tools": "U", "default": "C"}),
    ({CONFIG_FILE: {"chat_template": {"rag": "R"}}}, {"rag": "R"}),
    ({CONFIG_FILE: {"chat_template": "C"}, "chat_template.jinja": "J\n"}, {"default": "J\n"}),
    ({CONFIG_FILE: {"chat_template": "C"}, "chat_template.jinja": ""}, {"default": ""}),
    ({"chat_template.jinja": "J\r\nK"}, {"default": "J\nK"}),
    ({"chat_template.jinja": "J", f"{FOLDER}/rag.jinja": "R"}, {"default": "J", "rag": "R"}),
    ({CONFIG_FILE: {"chat_template": "C"}, f"{FOLDER}/rag.jinja": "R"}, {"rag": "R"}),
    ({f"{FOLDER}/default.jinja": "D", "chat_template.jinja": "J"}, {"default": "D"}),
    ({f"{FOLDER}/v1.0.jinja": "V", f"{FOLDER}/notes.txt": "N"}, {"v1.0": "V"}),
]


@pytest.mark.judge
@pytest.mark.parametrize(("files", "expected"), SOURCES)
def test_sources_equal_transformers(directory, files, expected):
    """Guards which template a checkpoint provides: all but two were ignored."""
    from transformers import PreTrainedTokenizerFast

    write(directory, files)
    assert Tokenizer.from_directory(directory).chat_templates == expected
    theirs = PreTrainedTokenizerFast.from_pretrained(directory).chat_template
    assert Tokenizer(backend(), chat_template=theirs).chat_templates == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template.json": {"chat_template": "P"}}, {"default": "P"}),
        (
            {"chat_template.json": {"chat_template": "P"}, CONFIG_FILE: {"chat_template": "C"}},
            {"default": "P"},
        ),
        (
            {
                "chat_template.json": {"chat_template": "P"},
                "processor_config.json": {"chat_template": "Q"},
            },
            {"default": "Q"},
        ),
        (
            {
                "processor_config.json": {"image_size": 5},
                "chat_template.json": {"chat_template": "J"},
                "chat_template.jinja": "J",
            },
            {"default": "J"},
        ),
        (
            {"chat_template.json": {"chat_template": "P"}, "chat_template.jinja": "J"},
            {"chat_template.jinja": "J", "chat_template.json": "P"},
        ),
        (
            {"chat_template.json": {"chat_template": "P"}, f"{FOLDER}/rag.jinja": "R"},
            {"default": "P", "rag": "R"},
        ),
        ({"chat_template.jinja": b"\xef\xbb\xbfJ"}, {"default": "J"}),
        ({CONFIG_FILE: b'\xef\xbb\xbf{"chat_template": "C"}'}, {"default": "C"}),
    ],
)
def test_other_sources(directory, files, expected):
    """Guards the files of processors, which vision models have, and byte order marks."""
    write(directory, files)
    assert Tokenizer.from_directory(directory).chat_templates == expected


@pytest.mark.judge
def test_processor_files_equal_transformers(directory):
    """Guards the two sources that only processors read: processor_config.json goes first."""
    from transformers import ProcessorMixin

    write(directory, {"chat_template.json": {"chat_template": "P"}})
    assert ProcessorMixin.get_processor_dict(directory)[0]["chat_template"] == "P"
    write(directory, {"processor_config.json": {"chat_template": "Q"}})
    assert ProcessorMixin.get_processor_dict(directory)[0]["chat_template"] == "Q"


def test_several_without_a_default(directory):
    """Guards against choosing one of several templates by chance, or saying that there is none."""
    write(directory, {CONFIG_FILE: named(tools="U", rag="R")})
    with pytest.raises(InputError, match="choose one with --chat-template: rag, tools$"):
        build_prompt([user("a")], Tokenizer.from_directory(directory), TINY)


def test_templates_are_saved(directory, tmp_path):
    """Guards against a saved checkpoint without its named templates or special tokens."""
    templates = {"default": STRINGS["qwen3"], "rag": "R\n"}
    special = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "image_token": "<im_patch>"}
    tokenizer = Tokenizer.byte_level(TINY)
    tokenizer = Tokenizer(
        tokenizer._backend, eos=(258,), chat_template=templates, special_tokens=special
    )
    tokenizer.save(tmp_path)
    saved = Tokenizer.from_directory(tmp_path)
    assert (saved.chat_templates, saved.special_tokens, saved.eos) == (templates, special, (258,))


def test_model_without_a_template(directory):
    """Guards against a `<think>` opened silently for a model that may not think."""
    with pytest.warns(UserWarning, match="tiny has no chat template: its prompts are .* ChatML"):
        ids = build_prompt([user("a")], Tokenizer.from_directory(directory), TINY)
    assert ids == [257, *b"user\na", 258, *b"\n", 257, *b"assistant\n"]


TEMPLATE_FORM = 'chat_template must be a string, or a list of {"name": "...", "template": "..."}'


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({CONFIG_FILE: {"chat_template": 5}}, f"{CONFIG_FILE}: {TEMPLATE_FORM}, not 5"),
        ({CONFIG_FILE: {"chat_template": [1]}}, f"{CONFIG_FILE}: {TEMPLATE_FORM}, not [1]"),
        ({CONFIG_FILE: {"chat_template": [{"a": 1}]}}, f"{CONFIG_FILE}: {TEMPLATE_FORM}"),
        ({CONFIG_FILE: {"chat_template": {"default": 1}}}, f"{CONFIG_FILE}: {TEMPLATE_FORM}"),
        ({CONFIG_FILE: {"chat_template": [{"name": []}]}}, f"{CONFIG_FILE}: {TEMPLATE_FORM}"),
        ({CONFIG_FILE: {"chat_template": [["default", "x"]]}}, f"{CONFIG_FILE}: {TEMPLATE_FORM}"),
        ({CONFIG_FILE: {"chat_template": True}}, f"{CONFIG_FILE}: {TEMPLATE_FORM}, not True"),
        ({"chat_template.json": {"chat_template": 5}}, f"chat_template.json: {TEMPLATE_FORM}"),
        ({"chat_template.json": []}, "chat_template.json must hold a JSON object"),
        ({"chat_template.jinja": b"\xe9"}, "chat_template.jinja is not UTF-8"),
        ({"chat_template.jinja/x": ""}, "chat_template.jinja is a directory; it must be a file"),
        ({f"{FOLDER}/x.jinja/y": ""}, "x.jinja is a directory; it must be a file"),
    ],
)
def test_bad_sources(directory, files, complaint):
    """Guards against tracebacks: the error names the file and what is right, in one line."""
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        write(directory, {name: content})
    with pytest.raises(InputError) as error:
        Tokenizer.from_directory(directory)
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_not_opened(directory):
    """Guards against waiting for a FIFO's writer forever, and passing over a broken link."""
    file = directory / "chat_template.jinja"
    os.mkfifo(file)
    with pytest.raises(InputError, match="chat_template.jinja is a pipe, socket or device"):
        Tokenizer.from_directory(directory)
    file.unlink()
    file.symlink_to("nowhere")
    with pytest.raises(InputError, match="chat_template.jinja cannot be read: No such file"):
        Tokenizer.from_directory(directory)
