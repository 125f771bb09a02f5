"""Messages to token ids: chat template, image layout, and protection from injected control tokens.

Only the chat template can write control tokens, and only an image part can place image tokens: the
same texts inside a message or a tool are encoded as ordinary text.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Protocol

from model.config import Config, TokenIds
from model.errors import ContextError, InputError
from model.text.chat_template import CHATML, CLOSE, IMAGE, OPEN, Turn, render_turns
from model.text.jinja_worker import CHARACTERS
from model.text.messages import OTHER_KEYS, read_tools, read_turn, strings, without_surrogates
from model.text.tokenizer import THINK_MARKERS, Tokenizer


class HasNewlines(Protocol):
    """The part of an image that its ids depend on, such as model.vision.image.Views."""

    @property
    def newlines(self) -> tuple[bool, ...]: ...


def build_prompt(
    messages: Sequence[Mapping],
    tokenizer: Tokenizer,
    config: Config,
    views: Sequence[HasNewlines] = (),
    *,
    tools: Sequence[Mapping] | None = None,
    max_tokens: int | None = None,
) -> list[int]:
    """The ids of a conversation up to where the assistant's next turn begins.

    `messages` are OpenAI-style: `{"role": ..., "content": ...}` with content a string or a list of
    `{"type": "text", "text": ...}` and `{"type": "image"}` parts, for assistants `tool_calls` and
    `reasoning_content`, for tools' results `tool_call_id` and `name`; so are the `tools`. `views`
    are the images of the image parts, in order. Warns if the model has no chat template. Raises
    InputError if there are no messages, one or a tool is malformed or has other keys, image parts
    and views differ in number, the model takes no images, or the template takes no tools or refuses
    the messages; and before tokenising, for more text than templates may write, or than
    `max_tokens` tokens can hold.
    """
    if not messages:
        raise InputError("there are no messages; give at least one, with a role and a content")
    if (characters := num_characters(messages, tools)) > CHARACTERS:
        raise InputError(
            f"the messages have {characters:,} characters; a prompt may have {CHARACTERS:,}"
        )
    template = tokenizer.chat_template
    if template is None:
        warnings.warn(
            f"{config.name} has no chat template: its prompts are written as ChatML", stacklevel=2
        )
        template = CHATML
    reserved = _reserved_texts(tokenizer, template, config.tokens)
    turns = [read_turn(message, reserved) for message in messages]
    definitions = read_tools(tools or (), reserved)
    _check_characters(turns, definitions, tokenizer)
    image_parts = sum(turn.texts.count(IMAGE) for turn in turns)
    if config.vision is None and (image_parts or views):
        raise InputError(f"{config.name} takes no images: it is a text-only model")
    if image_parts != len(views):
        raise InputError(f"image parts in the messages: {image_parts}, images given: {len(views)}")
    rendered = render_turns(template, turns, tokenizer.special_tokens, reserved, definitions)
    rendered = without_surrogates(rendered)
    if rendered.count(IMAGE) != len(views):
        raise InputError("the chat template leaves out or repeats an image in this conversation")
    if max_tokens is not None and len(rendered) > max_tokens:  # less text may fit
        _check_fits(rendered, tokenizer, max_tokens)
    ids = _encode(rendered, reserved, tokenizer, [image_ids(v.newlines, config) for v in views])
    _check_ids(ids, tokenizer, config)
    return ids


def opens_thinking(ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether a prompt ends with `<think>`, perhaps before white space: the answer begins inside
    the reasoning. One that a user wrote in an earlier turn does not count."""
    end = b""
    for id in reversed(ids[-16:]):  # `<think>` has 7 bytes
        if id in tokenizer.special:  # it ends the turn before, and has no bytes of its own
            break
        end = tokenizer.token_bytes(id) + end
    return end.rstrip().endswith(THINK_MARKERS[0].encode())


def num_characters(messages: Sequence[Mapping], tools: Sequence[Mapping] | None = None) -> int:
    """Characters of all texts of a conversation and its tools, which may be malformed."""
    messages = [message for message in messages if isinstance(message, Mapping)]
    contents = [message.get("content") for message in messages]
    parts = [
        part
        for content in contents
        for part in (content if isinstance(content, list | tuple) else [{"text": content}])
    ]
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    texts += strings([[message.get(key) for key in OTHER_KEYS] for message in messages])
    texts += strings(tools)
    return sum(len(text) for text in texts if isinstance(text, str))


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


def _reserved_texts(tokenizer: Tokenizer, template: str, tokens: TokenIds) -> re.Pattern:
    """A pattern of the texts that would encode to a control token or a structural image token.

    An added token that the template contains is a control token too, flagged special or not.
    """
    structural = {*tokens.eos, tokens.im_patch, tokens.im_start, tokens.im_end}
    structural |= {tokens.patch_start, tokens.patch_end, tokens.patch_newline}
    written = {
        id
        for id, text in tokenizer.added.items()
        if text in template and not text.isspace() and text not in THINK_MARKERS
    }
    reserved = tokenizer.special | structural | written
    texts = [text for id, text in tokenizer.added.items() if id in reserved and text]
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _check_characters(turns: Sequence[Turn], tools: list[dict], tokenizer: Tokenizer) -> None:
    """Raise InputError for a character that the vocabulary cannot write."""
    if not tokenizer.missing_bytes:
        return
    texts: list[tuple[str, object]] = [
        (f"message {number} (role {turn.role}) has", [turn.texts, turn.tool_calls, turn.fields])
        for number, turn in enumerate(turns, start=1)
    ]
    for subject, value in [*texts, ("the tools have", tools)]:
        for char in sorted(set("".join(strings(value))) - {IMAGE, OPEN, CLOSE}):
            if tokenizer.missing_bytes & set(char.encode()):
                raise InputError(
                    f"{subject} the character U+{ord(char):04X},"
                    " which the model's vocabulary cannot write"
                )


def _check_fits(rendered: str, tokenizer: Tokenizer, max_tokens: int) -> None:
    """Raise ContextError for a text of more than `max_tokens` tokens, however it is divided."""
    text = re.sub(f"[{IMAGE}{OPEN}{CLOSE}]", "", rendered)
    if (fewest := tokenizer.fewest_tokens(text)) > max_tokens:
        raise ContextError(
            f"the prompt has at least {fewest:,} tokens ({len(text):,} characters),"
            f" the context is {max_tokens:,}"
        )


def _check_ids(ids: Sequence[int], tokenizer: Tokenizer, config: Config) -> None:
    """Raise InputError for a token that the model lacks: tokenizers may have more of them."""
    if max(ids, default=0) >= config.decoder.vocab_size:
        raise InputError(
            f"the prompt has token {max(ids)} ({tokenizer.added.get(max(ids))!r}), the model's"
            f" vocabulary ends at {config.decoder.vocab_size - 1}"
        )


def _encode(
    rendered: str, reserved: re.Pattern, tokenizer: Tokenizer, images: list[list[int]]
) -> list[int]:
    # If a template cut a marked text in two, its unpaired marks are dropped, and the text is
    # still split there, so that its two sides are not encoded together. A control token's text
    # needs only one of its marks.
    control = f"(?:{reserved.pattern})"
    marks = f"({OPEN}{control}{CLOSE}?|{control}{CLOSE}|[{IMAGE}{OPEN}{CLOSE}])"
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
