"""Chat templates: which one a checkpoint has, and a conversation rendered with it.

The sources and their order are those of transformers: of its tokenizers and, for models with
images, its processors.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from model.errors import InputError, shown
from model.text.files import read_json, read_text
from model.text.jinja import TemplateError, render

CHATML = Path(__file__).with_name("chatml.jinja").read_text(encoding="utf-8")
# It opens `<think>`, where thinking models begin their answer.
THINKING_CHATML = CHATML.replace("assistant\\n", "assistant\\n<think>\\n")

# Unicode noncharacters that mark, in a rendered conversation, an image, the start and end of a
# control token's text that a user wrote, and those of a text in a trial. `model.text.messages`
# removes them from what users write.
IMAGE, OPEN, CLOSE, BEGIN, END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3", "\ufdd4"
WHAT = "the chat template"


TOOLS = "the tools"
NO_TOOLS = (
    "the model's chat template takes no tools; choose one that does with --chat-template, such as"
    " chatml"
)


@dataclass(frozen=True)
class Turn:
    """A message. Its content is a sequence of texts, each of them IMAGE or without one.

    `tool_calls` are OpenAI's, but with their arguments as objects; `fields` are the other keys.
    """

    role: str
    texts: tuple[str, ...]
    tool_calls: tuple[Mapping, ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)


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
    template: str,
    turns: Sequence[Turn],
    special_tokens: Mapping[str, str],
    control: re.Pattern,
    tools: Sequence[Mapping] = (),
) -> str:
    """The prompt that a template makes of a conversation; images are IMAGE characters.

    Some templates read a content as a string, some as a list of parts, and many lose the text of
    the other kind without an error. A trial with marked texts shows which kind this one reads.
    Raises InputError if the template fails, leaves out a text, a tool, a tool call or an image, or
    changes a text so that it has an unmarked match of `control`, the pattern of control tokens.
    """
    problem: InputError | None = None
    most = 0  # texts found: the kind with more of them is the one that the template reads
    for as_parts in (False, True):
        marks = _Marks()
        try:
            trial = _render(template, turns, special_tokens, tools, as_parts, marks)
        except TemplateError as error:
            problem = problem or error
            continue
        if not (lost := marks.lost(trial) or _lost_image(trial, turns)):
            marks.check_no_control_token(trial, control)
            rendered = _render(template, turns, special_tokens, tools, as_parts)
            if re.search(rf"\\ufdd1(?:{control.pattern})\\ufdd2", rendered):
                raise InputError(f"{WHAT} escapes the marks of a control token's text")
            return rendered
        found = len(marks.found(trial, END))
        if problem is None or found > most:
            problem, most = InputError(lost), found
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


class _Marks:
    """Puts unique marks around the texts of a trial, which survive if a template trims or escapes
    the texts, and tells from the rendered trial what the template does to them."""

    def __init__(self) -> None:
        self._texts: list[tuple[str, str]] = []

    def __call__(self, text: str, what: str, needs: str = "") -> str:
        """The marked text; `what` names it, `needs` are the marks that must be in the trial.

        A word that is not needed keeps its form: templates compare types and measure ids.
        """
        if not needs and re.fullmatch(r"[\w-]*", text):
            return text
        self._texts.append((what, needs))
        number = len(self._texts) - 1
        return f"{BEGIN}{number}{BEGIN}{text}{END}{number}{END}"

    def lost(self, trial: str) -> str | None:
        """What is wrong if the trial lacks a mark that it needs, else None."""
        found = {mark: self.found(trial, mark) for mark in (BEGIN, END)}
        for number, (what, needs) in enumerate(self._texts):
            if any(str(number) not in found[mark] for mark in needs):
                return NO_TOOLS if what == TOOLS else f"{WHAT} leaves out {what}"
        return None

    @staticmethod
    def found(trial: str, mark: str) -> set[str]:
        """The numbers of the texts whose `mark`, BEGIN or END, is in the trial."""
        return set(re.findall(f"{mark}(\\d+){mark}", trial))

    def check_no_control_token(self, trial: str, control: re.Pattern) -> None:
        """Raise InputError for a text in the trial that has an unmarked match of `control`."""
        marked = f"{OPEN}(?:{control.pattern}){CLOSE}"
        texts = re.findall(f"{BEGIN}(\\d+){BEGIN}(.*?){END}\\1{END}", trial, re.DOTALL)
        for number, text in texts:
            if control.search(re.sub(marked, OPEN, text)):
                what, _ = self._texts[int(number)]
                raise InputError(f"{WHAT} makes a control token of {what}")


Mark = Callable[[str, str, str], str]


def _unmarked(text: str, what: str, needs: str = "") -> str:
    return text


def _render(
    template: str,
    turns: Sequence[Turn],
    special_tokens: Mapping[str, str],
    tools: Sequence[Mapping],
    as_parts: bool,
    mark: Mark = _unmarked,
) -> str:
    messages = [_message(turn, n, as_parts, mark) for n, turn in enumerate(turns, start=1)]
    variables = {
        **special_tokens,
        "messages": messages,
        "tools": [_with_function(tool, TOOLS, mark) for tool in tools] or None,
        "documents": None,
        "add_generation_prompt": True,
    }
    return render(WHAT, template, variables, chat=True)


def _message(turn: Turn, number: int, as_parts: bool, mark: Mark) -> dict:
    """The message for a template. It may leave out the begin of an assistant's text, as templates
    remove earlier turns' reasoning, and other keys than content and tool calls."""
    where = f"message {number} (role {turn.role})"
    needs = END if turn.role == "assistant" else BEGIN + END
    texts = [t if t == IMAGE else mark(t, f"the text of {where}", needs) for t in turn.texts]
    content: object = "".join(texts)
    if as_parts:
        content = [{"type": "text", "text": text} for text in texts]
    elif turn.tool_calls and not texts:
        content = None
    message = {"role": turn.role, "content": content}
    message |= {key: mark(text, f"the {key} of {where}", "") for key, text in turn.fields.items()}
    if turn.tool_calls:
        what = f"a tool call of {where}"
        message["tool_calls"] = [_with_function(call, what, mark) for call in turn.tool_calls]
    return message


def _with_function(item: Mapping, what: str, mark: Mark) -> dict:
    """A tool or a tool call for a template, which must write its name and its arguments."""
    marked = _marked(item, what, "", mark)
    function = item["function"]
    marked["function"]["name"] = mark(function["name"], what, BEGIN + END)
    if "arguments" in function:
        marked["function"]["arguments"] = _marked(function["arguments"], what, BEGIN + END, mark)
    return marked


def _marked(value: Any, what: str, needs: str, mark: Mark) -> Any:  # noqa: ANN401
    """A value like JSON with all its strings and keys marked."""
    if isinstance(value, str):
        return mark(value, what, needs)
    if isinstance(value, Mapping):
        return {
            mark(key, what, needs): _marked(item, what, needs, mark) for key, item in value.items()
        }
    if isinstance(value, list):
        return [_marked(item, what, needs, mark) for item in value]
    return value


def _lost_image(trial: str, turns: Sequence[Turn]) -> str | None:
    if trial.count(IMAGE) == sum(turn.texts.count(IMAGE) for turn in turns):
        return None
    return f"{WHAT} leaves out or repeats an image: it must write each content once"
