"""The bodies of requests, as pydantic models.

A parameter that is not implemented is refused by name, never ignored. Some clients send such
parameters with values that change nothing (`"frequency_penalty": 0`): those are accepted, and so is
null for any of them.
"""

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

MAX_TOP_LOGPROBS = 20
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


class TextPart(Body):
    type: Literal["text"]
    text: str


class ImageUrl(Body):
    """`url` is a data URL, or what the server's flags allow. Images always have full detail."""

    neutral = {"detail": ("auto", "high")}
    url: str


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _kind(content: object) -> str:
    return "parts" if isinstance(content, list) else "text"


Text = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TextPart], Tag("parts")], Discriminator(_kind)
]
Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[Part], Tag("parts")], Discriminator(_kind)
]


class Function(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: Function


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
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class Tool(Body):
    neutral = TYPED
    role: Literal["tool"]
    content: Text
    tool_call_id: str
    name: str | None = None


Message = Annotated[System | User | Assistant | Tool, Field(discriminator="role")]


class FunctionDefinition(Body):
    neutral = {"strict": (False,)}
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ToolDefinition(Body):
    type: Literal["function"]
    function: FunctionDefinition


class StreamOptions(Body):
    neutral = {"continuous_usage_stats": (False,), "include_obfuscation": (False,)}
    include_usage: bool = False


class PacoreOptions(Body):
    """Many rollouts of one problem, whose messages the next round reads.

    widths: rollouts of each exploring round; a synthesis follows
    min_messages: a round ends when this many of its rollouts have; default: all
    events: whether the response has every rollout, and a stream the events of rounds
    """

    widths: list[Annotated[int, Field(ge=1, le=65_536)]] = Field(default=[16])
    min_messages: int | None = Field(default=None, ge=1)
    events: bool = False


class Generation(Body):
    """What chat and text completions have in common."""

    neutral = {
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "repetition_penalty": (1,),
        "min_p": (0,),
        "min_tokens": (0,),
        "logit_bias": ({},),
        "best_of": (1,),
        "use_beam_search": (False,),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "include_stop_str_in_output": (False,),
        "stop_token_ids": ([],),
        "suffix": ("",),
        "length_penalty": (1,),
    }

    model: str
    max_tokens: int | None = COUNT
    n: int = Field(default=1, ge=1, le=65_536)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: int | None = SEED
    temperature: float | None = Field(default=None, ge=0, le=1e6)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=10**9)
    ignore_eos: bool = False
    user: str | None = None


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

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = COUNT
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[ToolDefinition] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    metadata: dict[str, str] | None = None
    pacore: PacoreOptions | None = None


Ids = list[Annotated[int, Field(ge=0)]]


def _prompt_kind(prompt: object) -> str:
    """Which of the four forms of `prompt` a value is meant to be."""
    if not isinstance(prompt, list):
        return "text"
    first = prompt[0] if prompt else ""
    return "texts" if isinstance(first, str) else "id lists" if isinstance(first, list) else "ids"


class CompletionRequest(Generation):
    """The body of /v1/completions."""

    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[str], Tag("texts")]
        | Annotated[Ids, Tag("ids")]
        | Annotated[list[Ids], Tag("id lists")],
        Discriminator(_prompt_kind),
    ]
    max_tokens: int | None = Field(default=None, ge=0, le=10**9)
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)


class TokenizeRequest(Body):
    """A text, or a conversation. `add_special_tokens` changes nothing: these models add none."""

    neutral = {"add_generation_prompt": (True,), "return_token_strs": (False,)}
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[ToolDefinition] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _has_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: Ids
