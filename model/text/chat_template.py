"""Chat templates: which one a checkpoint has, and a conversation rendered with it.

The sources and their order are those of transformers: of its tokenizers and, for models with
images, its processors.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from model.errors import InputError, shown
from model.text.files import read_json, read_text
from model.text.jinja import TemplateError, render

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# It opens `<think>`, where thinking models begin their answer.
THINKING_CHATML = CHATML.replace("assistant\n", "assistant\n<think>\n")

# Unicode noncharacters that mark, in a rendered conversation, an image, the start and end of a
# control token's text that a user wrote, and those of a message's text in a trial.
# `model.text.prompt` removes them from messages.
IMAGE, OPEN, CLOSE, BEGIN, END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3", "\ufdd4"
WHAT = "the chat template"


@dataclass(frozen=True)
class Turn:
    """A message whose content is a sequence of texts, each of them IMAGE or without one."""

    role: str
    texts: tuple[str, ...]


def read_chat_templates(path: Path, settings: Mapping) -> dict[str, str]:
    """The templates of a checkpoint's directory by name; `settings` are its tokenizer_config.json.

    The first of these that exists: chat_template.jinja and additional_chat_templates/*.jinja;
    processor_config.json or chat_template.json; tokenizer_config.json. If the first two differ,
    which model libraries read differently, they are named after their files.
    Raises InputError for a file that cannot be read or has another form.
    """
    templates = {}
    default = read_text(path / "chat_template.jinja")
    if default is not None:
        templates["default"] = default
    for file in sorted((path / "additional_chat_templates").glob("*.jinja")):
        templates[file.stem] = read_text(file) or ""
    for name in ("processor_config.json", "chat_template.json"):
        processor = _named(read_json(path / name) or {}, path / name)
        if processor:
            if default is not None and processor != {"default": default}:
                return {"chat_template.jinja": default, name: next(iter(processor.values()))}
            return processor | templates
    return templates or _named(settings, path / "tokenizer_config.json")


def render_turns(
    template: str, turns: Sequence[Turn], special_tokens: Mapping[str, str], control: re.Pattern
) -> str:
    """The prompt that a template makes of a conversation; images are IMAGE characters.

    Some templates read a content as a string, some as a list of parts, and many lose the text of
    the other kind without an error. A trial with marked texts shows which kind this one reads.
    Raises InputError if the template fails, leaves out a text or an image, or changes a text so
    that it has an unmarked match of `control`, the pattern of control tokens.
    """
    problem: InputError | None = None
    for as_parts in (False, True):
        try:
            trial = _render(template, turns, special_tokens, as_parts, marked=True)
        except TemplateError as error:
            problem = problem or error
            continue
        if not (lost := _lost(trial, turns)):
            _check_no_control_token(trial, control)
            return _render(template, turns, special_tokens, as_parts)
        if problem is None or END in trial:  # it reads this kind, or neither
            problem = InputError(lost)
    assert problem is not None
    raise problem


def _named(settings: Mapping, file: Path) -> dict[str, str]:
    """The entry `chat_template` of a JSON file: a template, or several with names."""
    entry = settings.get("chat_template")
    if entry is None:
        return {}
    pairs = None
    if isinstance(entry, str):
        pairs = [("default", entry)]
    elif isinstance(entry, dict):
        pairs = list(entry.items())
    elif isinstance(entry, list) and all(isinstance(item, dict) for item in entry):
        pairs = [(item.get("name"), item.get("template")) for item in entry]
    if pairs is None or not all(isinstance(text, str) for pair in pairs for text in pair):
        raise InputError(
            f"{file}: chat_template must be a string, or a list of"
            f' {{"name": "...", "template": "..."}}, not {shown(entry)}'
        )
    return dict(pairs)


def _render(
    template: str,
    turns: Sequence[Turn],
    special_tokens: Mapping[str, str],
    as_parts: bool,
    marked: bool = False,
) -> str:
    messages = []
    for number, turn in enumerate(turns):
        texts = turn.texts
        if marked:
            texts = tuple(_mark(text, number, index) for index, text in enumerate(texts))
        parts = [{"type": "text", "text": text} for text in texts]
        messages.append({"role": turn.role, "content": parts if as_parts else "".join(texts)})
    variables = {
        **special_tokens,
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
    }
    return render(WHAT, template, variables, chat=True)


def _mark(text: str, number: int, index: int) -> str:
    """The text between unique marks, which survive if a template trims or escapes the text."""
    if text == IMAGE:
        return text
    name = f"{number}.{index}"
    return f"{BEGIN}{name}{BEGIN}{text}{END}{name}{END}"


def _check_no_control_token(trial: str, control: re.Pattern) -> None:
    for index, text in re.findall(f"{BEGIN}(\\d+)[.]\\d+{BEGIN}(.*?){END}", trial, re.DOTALL):
        if control.search(re.sub(f"{OPEN}(?:{control.pattern}){CLOSE}", OPEN, text)):
            number = int(index) + 1
            raise InputError(f"{WHAT} makes a control token of the text of message {number}")


def _lost(trial: str, turns: Sequence[Turn]) -> str | None:
    """What the rendered trial lacks, or None.

    The begin of an assistant's text may be missing: templates remove earlier turns' reasoning.
    """
    for number, turn in enumerate(turns):
        for index, text in enumerate(turn.texts):
            name = f"{number}.{index}"
            begins = turn.role == "assistant" or f"{BEGIN}{name}{BEGIN}" in trial
            if text != IMAGE and not (begins and f"{END}{name}{END}" in trial):
                return f"{WHAT} leaves out the text of message {number + 1} (role {turn.role})"
    if trial.count(IMAGE) != sum(turn.texts.count(IMAGE) for turn in turns):
        return f"{WHAT} leaves out or repeats an image: it must write each content once"
    return None
