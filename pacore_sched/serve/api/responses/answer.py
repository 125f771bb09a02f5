"""A request to /v1/responses, from its body to the response. It runs as a chat request."""

import json
import re
import secrets
import time
from bisect import bisect_left
from collections.abc import AsyncIterator

from pacore_sched.answers.journal_lines import RolloutResult
from pacore_sched.serve.api import pacore
from pacore_sched.serve.api.chat import ChatAnswer
from pacore_sched.serve.api.context import Context
from pacore_sched.serve.api.responses.body import ResponsesRequest
from pacore_sched.serve.api.responses.conversion import chat_request
from pacore_sched.serve.api.responses.items import Output
from pacore_sched.serve.errors import ApiError
from pacore_sched.serve.jobs import Ended, RolloutEnded
from pacore_sched.serve.text.rollout_text import RolloutText
from pacore_sched.serve.text.sections import END_THINK, THINK


class ResponseAnswer:
    """One request: `submit` it, then read `whole` or `chunks`, and `close` it in the end."""

    def __init__(self, context: Context, body: ResponsesRequest) -> None:
        """Raises ApiError for a body that is wrong, or beyond a limit."""
        self.body = body
        self._converted = chat_request(body)
        with self._converted.errors():
            self._chat = ChatAnswer(context, self._converted.chat)
        self._tokenizer = context.service.model.tokenizer
        self.usage = self._chat.usage
        self._output = Output()
        self._number = 0  # of the next event
        self._head = self._fields()

    async def submit(self) -> None:
        """Hand the request to the engine. Raises ApiError if it is refused."""
        with self._converted.errors():
            await self._chat.submit()

    def close(self) -> None:
        """End the request, if it has not ended: its client has left, or it failed."""
        self._chat.close()

    async def whole(self) -> dict:
        """The response of a request without `stream`. Raises ApiError if it fails."""
        response: dict = {}
        async for event in self._events():
            response = event.get("response", response)
        return response

    async def chunks(self) -> AsyncIterator[str]:
        """The frames of a request with `stream`. Raises ApiError if it fails."""
        async for event in self._events():
            yield self._frame(event)

    def failure(self, error: ApiError) -> str:
        """The last frame of a stream that fails."""
        failed = {"code": "server_error", "message": error.message}
        return self._frame(
            {"type": "response.failed", "response": self._response("failed", error=failed)}
        )

    async def _events(self) -> AsyncIterator[dict]:
        """The events of a stream, without their numbers; the last one has the whole response."""
        for name in ("created", "in_progress"):
            yield {"type": f"response.{name}", "response": self._response("in_progress")}
        options, widths = self._chat.options, self._chat.settings.widths
        hidden_tokens = 0  # of exploring rounds
        last: RolloutResult | None = None
        fields: dict = {}
        async for event in self._chat.events():
            if options and options.events and self.body.stream:
                for name, data in pacore.events_of(event, widths):
                    yield {"type": name, **data}
            for _, delta, _, _ in self._chat.deltas(event):
                for item_event in self._output.take(delta):
                    yield item_event
            match event:
                case RolloutEnded(result) if result.round < len(widths) - 1:
                    hidden_tokens += result.num_tokens
                case RolloutEnded(result):
                    last = result
                case Ended(answer) if options:
                    texts = options.events and not self.body.stream
                    fields["pacore"] = pacore.summary(answer, texts=texts)
        assert last is not None
        status = "incomplete" if last.finish_reason == "length" else "completed"
        for item_event in self._output.end(status):
            yield item_event
        if status == "completed":
            fields["completed_at"] = int(time.time())
        else:
            fields["incomplete_details"] = {"reason": "max_output_tokens"}
        fields["usage"] = self._usage(hidden_tokens + self._reasoning_tokens(last))
        yield {"type": f"response.{status}", "response": self._response(status, **fields)}

    def _frame(self, event: dict) -> str:
        data = event | {"sequence_number": self._number}
        self._number += 1
        return f"event: {event['type']}\ndata: {json.dumps(data)}\n\n"

    def _response(self, status: str, **fields: object) -> dict:
        return self._head | {"status": status, "output": self._output.items} | fields

    def _fields(self) -> dict:
        """What the response says from the beginning: the request as it was understood."""
        body, sampling = self.body, self._chat.settings.sampling
        tools = [tool.model_dump() | {"strict": False} for tool in body.tools or ()]
        return {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": "",
            "model": body.model,
            "output": [],
            "error": None,
            "incomplete_details": None,
            "usage": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_logprobs": 0,
            "tools": tools,
            "tool_choice": body.tool_choice or "auto",
            "parallel_tool_calls": True,
            "text": {"format": {"type": "text"}},
            "reasoning": {"effort": None, "summary": None},
            "truncation": "disabled",
            "background": False,
            "store": False,
            "previous_response_id": None,
            "service_tier": "default",
            "metadata": body.metadata or {},
            "user": body.user,
            "safety_identifier": body.safety_identifier,
            "prompt_cache_key": body.prompt_cache_key,
        }

    def _reasoning_tokens(self, result: RolloutResult) -> int:
        """Tokens of the answer up to the end of its reasoning."""
        if not self._output.items or self._output.items[0]["type"] != "reasoning":
            return 0
        reasoning = self._output.items[0]["content"][0]["text"]
        tags = re.match(rf"(\s*{THINK})*", result.text)
        assert tags is not None
        end = tags.end() + len(reasoning)
        if result.text.startswith(END_THINK, end):
            end += len(END_THINK)
        text = RolloutText(self._tokenizer.token_bytes)
        text.push(result.tokens)
        return bisect_left(text.offsets, end)

    def _usage(self, reasoning_tokens: int) -> dict:
        usage = self.usage
        return {
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached, "cache_write_tokens": 0},
            "output_tokens": usage.completion,
            "output_tokens_details": {"reasoning_tokens": reasoning_tokens},
            "total_tokens": usage.prompt + usage.completion,
        }
