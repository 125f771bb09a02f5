"""The bodies of requests, as pydantic models.

A parameter that is not implemented is refused by name, never ignored. Some clients send such
parameters with values that change nothing (`"frequency_penalty": 0`): those are accepted, and so is
null for any of them.
"""

import json
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import MaxLen
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pacore_sched.sched.request import MAX_TOP_LOGPROBS

# Lengths of lists: what a request may need, and little enough to check in a moment.
MAX_MESSAGES, MAX_PARTS, MAX_TOOLS = 4096, 4096, 1024
MAX_ROUNDS, MAX_STOPS, MAX_PROMPTS = 8, 16, 256
MAX_IDS = 2**18  # more than any context
MAX_CHARACTERS = 2**20  # of a text for /tokenize: about a second of work
SEED = Field(default=None, ge=-(2**63), le=2**63 - 1)
COUNT = Field(default=None, ge=1, le=10**9)


class Body(BaseModel):
    """Refuses unknown keys. `neutral` has the values that change nothing, by parameter."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    neutral: ClassVar[dict[str, tuple]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept = {}
        for key, item in value.items():
            field = cls.model_fields.get(key)
            if field is None and item is not None and key not in cls.neutral:
                # At the first: a body may have a million of them.
                raise PydanticCustomError("unknown", "there is no parameter {key}", {"key": key})
            if item is None and not (field and field.is_required()):
                continue  # the default
            if field is None and key in cls.neutral:
                accepted = cls.neutral[key]
                is_bool = isinstance(item, bool)
                if not any(isinstance(one, bool) == is_bool and item == one for one in accepted):
                    raise PydanticCustomError(
                        "not_implemented",
                        "{key} is not implemented; it may only be {values}",
                        {"key": key, "values": " or ".join(map(json.dumps, accepted))},
                    )
                continue
            kept[key] = item
        return kept


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("unicode", "has half of a surrogate pair") from None
    return text


def _json(value: dict) -> dict:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise PydanticCustomError("json", "has NaN, or half of a surrogate pair") from None
    return value


Str = Annotated[str, AfterValidator(_encodable)]


class FirstError(FailFast):
    """Ends the check of a list at the first error, which takes 10 microseconds: a body has room for
    millions. Unlike pydantic's own it can be hashed, as unions need."""

    __hash__ = object.__hash__


def bounded(most: int) -> tuple[FirstError, MaxLen]:
    """The check of a list that comes from a client."""
    return FirstError(), MaxLen(most)


class TextPart(Body):
    type: Literal["text"]
    text: Str


class ImageUrl(Body):
    """`url` is a data URL, or what the server's flags allow. Images always have full detail."""

    neutral = {"detail": ("auto", "high")}
    url: Str = Field(min_length=1)


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def text_or_parts(content: object) -> str:
    """Which of these two forms a value is meant to be."""
    return "parts" if isinstance(content, list) else "text"


Text = Annotated[
    Annotated[Str, Tag("text")] | Annotated[list[TextPart], *bounded(MAX_PARTS), Tag("parts")],
    Discriminator(text_or_parts),
]
Content = Annotated[
    Annotated[Str, Tag("text")] | Annotated[list[Part], *bounded(MAX_PARTS), Tag("parts")],
    Discriminator(text_or_parts),
]


class Function(Body):
    name: Str
    arguments: Str


class ToolCall(Body):
    """`index` is that of a stream; clients keep it."""

    id: Str
    type: Literal["function"] = "function"
    function: Function
    index: int | None = Field(default=None, exclude=True)


TYPED = {"type": ("text",)}  # lm-evaluation-harness writes it into every message


class System(Body):
    neutral = TYPED
    role: Literal["system", "developer"]
    content: Text


class User(Body):
    neutral = TYPED
    role: Literal["user"]
    content: Content


class Assistant(Body):
    neutral = TYPED | {"annotations": ([],)}
    role: Literal["assistant"]
    content: Text | None = None
    reasoning_content: Str | None = None
    tool_calls: Annotated[list[ToolCall], *bounded(MAX_PARTS)] | None = None


class Tool(Body):
    neutral = TYPED
    role: Literal["tool"]
    content: Text
    tool_call_id: Str
    name: Str | None = None


Message = Annotated[System | User | Assistant | Tool, Field(discriminator="role")]


class FunctionDefinition(Body):
    """`strict`, which OpenAI's client writes, does not force arguments into the schema here."""

    name: Str = Field(min_length=1, max_length=256)
    description: Str | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_json)] | None = None
    strict: bool | None = Field(default=None, exclude=True)


class ToolDefinition(Body):
    type: Literal["function"]
    function: FunctionDefinition


class StreamOptions(Body):
    """continuous_usage_stats: with include_usage, every chunk has the usage so far"""

    neutral = {"include_obfuscation": (False,)}
    include_usage: bool = False
    continuous_usage_stats: bool = False


class PacoreOptions(Body):
    """Many rollouts of one problem, whose messages the next round reads.

    widths: rollouts of each exploring round; a synthesis follows
    min_messages: a round ends when this many of its rollouts have; default: all
    events: whether the response has every rollout, and a stream the events of rounds
    """

    widths: Annotated[list[Annotated[int, Field(ge=1, le=65_536)]], *bounded(MAX_ROUNDS)] = [16]
    min_messages: int | None = Field(default=None, ge=1)
    events: bool = False


class Sampled(Body):
    """What all requests for generated text have in common.

    cache_salt: prompts find only KV that others with the same have written
    """

    neutral = {
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "repetition_penalty": (1,),
        "min_p": (0,),
        "min_tokens": (0,),
        "logit_bias": ({},),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "include_stop_str_in_output": (False,),
        "stop_token_ids": ([],),
        "length_penalty": (1,),
    }

    model: str
    stream: bool = False
    stop: Str | Annotated[list[Str], *bounded(MAX_STOPS)] | None = None
    seed: int | None = SEED
    temperature: float | None = Field(default=None, ge=0, le=1e6)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=10**9)
    ignore_eos: bool = False
    user: Str | None = None
    cache_salt: Annotated[Str, Field(min_length=1)] | None = None


class Generation(Sampled):
    """What chat and text completions have in common."""

    neutral = Sampled.neutral | {
        "best_of": (1,),
        "use_beam_search": (False,),
        "suffix": ("",),
    }

    max_tokens: int | None = COUNT
    n: int = Field(default=1, ge=1, le=65_536)
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _streams(self) -> "Generation":
        if self.stream_options and not self.stream:
            raise PydanticCustomError("alone", "stream_options needs stream: true")
        return self


Metadata = Annotated[dict[Str, Str], Field(max_length=64)]


class ChatRequest(Generation):
    """The body of /v1/chat/completions. `user` and `metadata` are accepted and have no effect."""

    neutral = Generation.neutral | {
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "parallel_tool_calls": (True,),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "echo": (False,),
        "chat_template_kwargs": ({},),
        "separate_reasoning": (True,),
        "include_reasoning": (True,),
    }

    messages: Annotated[list[Message], *bounded(MAX_MESSAGES), Field(min_length=1)]
    max_completion_tokens: int | None = COUNT
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: Annotated[list[ToolDefinition], *bounded(MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    metadata: Metadata | None = None
    pacore: PacoreOptions | None = None


Ids = Annotated[list[Annotated[int, Field(ge=0)]], *bounded(MAX_IDS)]


def _prompt_kind(prompt: object) -> str:
    """Which of the four forms of `prompt` a value is meant to be."""
    if not isinstance(prompt, list):
        return "text"
    first = prompt[0] if prompt else ""
    return "texts" if isinstance(first, str) else "id lists" if isinstance(first, list) else "ids"


class CompletionRequest(Generation):
    """The body of /v1/completions."""

    prompt: Annotated[
        Annotated[Str, Tag("text")]
        | Annotated[list[Str], *bounded(MAX_PROMPTS), Tag("texts")]
        | Annotated[Ids, Tag("ids")]
        | Annotated[list[Ids], *bounded(MAX_PROMPTS), Tag("id lists")],
        Discriminator(_prompt_kind),
    ]
    max_tokens: int | None = Field(default=None, ge=0, le=10**9)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)


class TokenizeRequest(Body):
    """A text, or a conversation. `add_special_tokens` changes nothing: these models add none."""

    neutral = {"add_generation_prompt": (True,), "return_token_strs": (False,)}
    model: str | None = None
    prompt: Annotated[Str, Field(max_length=MAX_CHARACTERS)] | None = None
    messages: Annotated[list[Message], *bounded(MAX_MESSAGES)] | None = None
    tools: Annotated[list[ToolDefinition], *bounded(MAX_TOOLS)] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _has_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("one", "give either prompt or messages")
        return self


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Ids
