"""Messages to token ids: chat template, image layout, and protection from injected control tokens.

Only the chat template can write control tokens, and only an image part can place image tokens: the
same texts inside a message are encoded as ordinary text. jinja2 renders the template as
transformers does, and sandboxed, because templates come with checkpoints.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from model.config import Config, TokenIds
from model.errors import InputError
from model.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import jinja2

# For tokenizers without a template. It opens `<think>`, where thinking models begin their answer.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
ROLES = ("system", "user", "assistant")

# Unicode noncharacters that mark, in the rendered prompt, the position of an image, and the start
# and end of a control token's text that a user wrote. They are removed from messages first.
IMAGE, OPEN, CLOSE = "\ufdd0", "\ufdd1", "\ufdd2"


class HasNewlines(Protocol):
    """The part of an image that its ids depend on, such as model.vision.image.Views."""

    @property
    def newlines(self) -> tuple[bool, ...]: ...


def build_prompt(
    messages: Sequence[Mapping],
    tokenizer: Tokenizer,
    config: Config,
    views: Sequence[HasNewlines] = (),
) -> list[int]:
    """The ids of a conversation up to where the assistant's next turn begins.

    `messages` are OpenAI-style: `{"role": ..., "content": ...}` with content a string or a list of
    `{"type": "text", "text": ...}` and `{"type": "image"}` parts; `views` are the images of these
    image parts, in order. Raises InputError if there are no messages, one is malformed, image parts
    and views differ in number, the model takes no images, or the template refuses the messages.
    """
    if not messages:
        raise InputError("there are no messages; give at least one, with a role and a content")
    reserved = _reserved_texts(tokenizer, config.tokens)
    turns = [_turn(message, reserved) for message in messages]
    image_parts = sum(turn["content"].count(IMAGE) for turn in turns)
    if config.vision is None and (image_parts or views):
        raise InputError(f"{config.name} takes no images: it is a text-only model")
    if image_parts != len(views):
        raise InputError(f"image parts in the messages: {image_parts}, images given: {len(views)}")
    rendered = _render(tokenizer.chat_template or CHATML, turns)
    if rendered.count(IMAGE) != len(views):
        raise InputError(
            "the chat template leaves out or repeats an image: it must write each content once"
        )
    return _encode(rendered, reserved, tokenizer, [image_ids(v.newlines, config) for v in views])


def image_ids(newlines: Sequence[bool], config: Config) -> list[int]:
    """The ids of one image: its crops (one per item of `newlines`), then its global view."""
    tokens, vision = config.tokens, config.vision
    assert vision is not None, f"{config.name} takes no images"
    ids = []
    for newline in newlines:
        ids += [tokens.patch_start, *[tokens.im_patch] * vision.crop_tokens, tokens.patch_end]
        ids += [tokens.patch_newline] if newline else []
    return [*ids, tokens.im_start, *[tokens.im_patch] * vision.image_tokens, tokens.im_end]


def image_head_length(ids: Sequence[int], tokenizer: Tokenizer, tokens: TokenIds) -> int:
    """Number of leading ids up to the end of the images that open the last user turn; 0 if it opens
    with none.

    These ids stay the same when only the text of that turn changes.
    """
    opening = tokenizer.encode("<|im_start|>user\n")
    ids, size = list(ids), len(opening)
    starts = range(len(ids) - size, -1, -1)
    last = next((i for i in starts if ids[i : i + size] == opening), None)
    if last is None:
        return 0
    first = end = last + size
    while end < len(ids) and ids[end] in (tokens.im_start, tokens.patch_start):
        end = ids.index(tokens.im_end, end) + 1
    return end if end > first else 0


def _reserved_texts(tokenizer: Tokenizer, tokens: TokenIds) -> re.Pattern:
    """A pattern of the texts that would encode to a control token or a structural image token."""
    structural = {*tokens.eos, tokens.im_patch, tokens.im_start, tokens.im_end}
    structural |= {tokens.patch_start, tokens.patch_end, tokens.patch_newline}
    texts = [text for id, text in tokenizer.added.items() if id in tokenizer.special | structural]
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


def _turn(message: Mapping, reserved: re.Pattern) -> dict[str, str]:
    """The message with its content as one string, in which images and reserved texts are marked."""
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise InputError(f"a message needs a role, one of {', '.join(ROLES)}: {message!r:.80}")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list | tuple):
        raise InputError(
            f"a message's content must be a string or a list of parts: {message!r:.80}"
        )
    text = "".join(map(_part, parts))
    return {"role": message["role"], "content": reserved.sub(rf"{OPEN}\g<0>{CLOSE}", text)}


def _part(part: Mapping) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        return IMAGE
    if kind == "text" and isinstance(part.get("text"), str):
        text = re.sub("[\ud800-\udfff]", "\ufffd", part["text"])  # UTF-8 cannot encode surrogates
        return re.sub(f"[{IMAGE}{OPEN}{CLOSE}]", "", text)
    raise InputError(
        'a content part must be {"type": "text", "text": "..."} or {"type": "image"}, not '
        f"{part!r:.80}"
    )


def _encode(
    rendered: str, reserved: re.Pattern, tokenizer: Tokenizer, images: list[list[int]]
) -> list[int]:
    # If a template cut a marked text in two, its lone marks are dropped. The text is split there
    # all the same, so that its two sides are not encoded together.
    marks = f"({OPEN}(?:{reserved.pattern}){CLOSE}|[{IMAGE}{OPEN}{CLOSE}])"
    remaining = iter(images)
    ids = []
    for index, piece in enumerate(re.split(marks, rendered)):
        if index % 2 == 0:  # the text between marks
            ids += tokenizer.encode(piece)
        elif piece == IMAGE:
            ids += next(remaining)
        else:
            ids += tokenizer.encode(piece.strip(OPEN + CLOSE), special=False)
    return ids


def _render(template: str, turns: list[dict[str, str]]) -> str:
    from jinja2 import TemplateError

    try:
        return _compiled(template).render(messages=turns, tools=None, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise InputError(f"the chat template failed: {' '.join(str(error).split())}") from None


@lru_cache
def _compiled(source: str) -> "jinja2.Template":
    from datetime import datetime

    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)
