"""Requests to /tokenize and /detokenize, in vLLM's form."""

from model.errors import InputError
from model.text.prompt import build_prompt
from pacore_sched.serve.api.context import Context
from pacore_sched.serve.api.requests import DetokenizeRequest, ImagePart, TokenizeRequest
from pacore_sched.serve.errors import of_input, refused


def tokenize(context: Context, body: TokenizeRequest) -> dict:
    """The tokens of a text or of a conversation; may take long. Raises ApiError."""
    model = context.service.model
    if body.model is not None:
        context.names.widths(body.model)
    try:
        if body.messages is None:
            tokens = model.tokenizer.encode(body.prompt or "")
        else:
            parts = [m.content for m in body.messages if isinstance(m.content, list)]
            if any(isinstance(part, ImagePart) for content in parts for part in content):
                raise refused("images are not tokenized here", "messages")
            messages = [message.model_dump(exclude_none=True) for message in body.messages]
            tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
            tokens = build_prompt(messages, model.tokenizer, model.config, tools=tools or None)
    except InputError as error:
        raise of_input(error, "prompt" if body.messages is None else "messages") from None
    context_tokens = model.config.decoder.max_positions
    return {"count": len(tokens), "max_model_len": context_tokens, "tokens": tokens}


def detokenize(context: Context, body: DetokenizeRequest) -> dict:
    """The text of some tokens; control tokens are written as their names. Raises ApiError."""
    model = context.service.model
    if body.model is not None:
        context.names.widths(body.model)
    if max(body.tokens, default=0) >= model.config.decoder.vocab_size:
        raise refused(
            f"token {max(body.tokens)} is not in [0, {model.config.decoder.vocab_size})", "tokens"
        )
    tokenizer = model.tokenizer
    data = [tokenizer.added[i].encode() if i in tokenizer.special else tokenizer.token_bytes(i)
            for i in body.tokens]  # fmt: skip
    return {"prompt": b"".join(data).decode("utf-8", errors="replace")}
