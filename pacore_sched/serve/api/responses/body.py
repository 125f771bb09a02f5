"""The body of /v1/responses, as pydantic models: the part of OpenAI's Responses API that is here.

Nothing is stored, so what refers to earlier responses is refused. Of what clients send, these are
accepted and change nothing: ids and states of items, `user`, `safety_identifier`,
`prompt_cache_key`, and `include` of encrypted reasoning, as reasoning is not hidden here.
"""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from pacore_sched.serve.api.requests import (
    COUNT,
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOOLS,
    Body,
    FunctionDefinition,
    Metadata,
    PacoreOptions,
    Sampled,
    Str,
    bounded,
    text_or_parts,
)

MAX_ITEMS = MAX_MESSAGES - 1  # the instructions are a message, too
ITEMS = "message", "reasoning", "function_call", "function_call_output"


class InputText(Body):
    type: Literal["input_text"]
    text: Str


class InputImage(Body):
    """`image_url` is a data URL, or what the server's flags allow. Images always have full
    detail."""

    neutral = {"detail": ("auto", "high")}
    type: Literal["input_image"]
    image_url: Str = Field(min_length=1)


class OutputText(Body):
    neutral = {"annotations": ([],), "logprobs": ([],)}
    type: Literal["output_text"]
    text: Str


class ReasoningText(Body):
    type: Literal["reasoning_text"]
    text: Str


InputPart = Annotated[InputText | InputImage, Field(discriminator="type")]
TextContent = Annotated[
    Annotated[Str, Tag("text")] | Annotated[list[InputText], *bounded(MAX_PARTS), Tag("parts")],
    Discriminator(text_or_parts),
]
UserContent = Annotated[
    Annotated[Str, Tag("text")] | Annotated[list[InputPart], *bounded(MAX_PARTS), Tag("parts")],
    Discriminator(text_or_parts),
]
AssistantContent = Annotated[
    Annotated[Str, Tag("text")] | Annotated[list[OutputText], *bounded(MAX_PARTS), Tag("parts")],
    Discriminator(text_or_parts),
]


class Item(Body):
    id: Str | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None


class System(Item):
    type: Literal["message"] = "message"
    role: Literal["system", "developer"]
    content: TextContent


class User(Item):
    type: Literal["message"] = "message"
    role: Literal["user"]
    content: UserContent


class Assistant(Item):
    type: Literal["message"] = "message"
    role: Literal["assistant"]
    content: AssistantContent


class Reasoning(Item):
    neutral = {"summary": ([],)}
    type: Literal["reasoning"]
    content: Annotated[list[ReasoningText], *bounded(MAX_PARTS)] | None = None


class FunctionCall(Item):
    type: Literal["function_call"]
    call_id: Str = Field(min_length=1)
    name: Str = Field(min_length=1)
    arguments: Str


class FunctionCallOutput(Item):
    type: Literal["function_call_output"]
    call_id: Str = Field(min_length=1)
    output: TextContent


def _type_of(item: object) -> str | None:
    """The type of an item; messages need not give it."""
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return "message" if kind is None else kind if kind in ITEMS else None


InputItem = Annotated[
    Annotated[
        Annotated[System | User | Assistant, Field(discriminator="role")],
        Tag("message"),
    ]
    | Annotated[Reasoning, Tag("reasoning")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")],
    Discriminator(
        _type_of,
        custom_error_type="item_type",
        custom_error_message=f"the type of an item may be {', '.join(ITEMS[:-1])} or {ITEMS[-1]}",
    ),
]


class Function(Body):
    type: Literal["function"]


class FunctionTool(FunctionDefinition, Function):
    """In this order of classes the type is checked first, so that other tools are refused by it."""


class TextOptions(Body):
    neutral = {"format": ({"type": "text"},), "verbosity": ("medium",)}


class ReasoningOptions(Body):
    neutral = {
        "effort": ("medium",),
        "summary": ("auto",),
        "generate_summary": ("auto",),
        "context": ("auto",),
        "mode": ("standard",),
    }


class StreamOptions(Body):
    neutral = {"include_obfuscation": (False,)}


class ResponsesRequest(Sampled):
    """`stop`, `seed`, `top_k`, `ignore_eos` and `pacore` are as in chat; OpenAI has none of
    them."""

    neutral = Sampled.neutral | {
        "background": (False,),
        "conversation": (None,),
        "max_tool_calls": (None,),
        "parallel_tool_calls": (True,),
        "previous_response_id": (None,),
        "prompt": (None,),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }

    input: Annotated[
        Annotated[Str, Tag("text")]
        | Annotated[list[InputItem], *bounded(MAX_ITEMS), Field(min_length=1), Tag("parts")],
        Discriminator(text_or_parts),
    ]
    instructions: Str | None = None
    max_output_tokens: int | None = COUNT
    tools: Annotated[list[FunctionTool], *bounded(MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    include: Annotated[list[Literal["reasoning.encrypted_content"]], *bounded(MAX_PARTS)] | None = (
        None
    )
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    stream_options: StreamOptions | None = None
    metadata: Metadata | None = None
    safety_identifier: Str | None = None
    prompt_cache_key: Str | None = None
    pacore: PacoreOptions | None = None

    @model_validator(mode="after")
    def _streams(self) -> "ResponsesRequest":
        if self.stream_options and not self.stream:
            raise PydanticCustomError("alone", "stream_options needs stream: true")
        return self
