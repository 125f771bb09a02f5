"""Two hundred requests at once on the tiny model, some of which misbehave."""

import asyncio
import random
import re
from collections import Counter

from openai import AsyncOpenAI

from model.step3vl import Step3VL
from pacore_sched.answers.pacore import engine_for
from pacore_sched.serve.limits import Limits
from pacore_sched.serve.metrics import Metrics
from pacore_sched.serve.service import Service
from tests.pacore_sched.serve.serving import Running, running
from tests.pacore_sched.serve.test_tiny import data_url, photo

REQUESTS = 200
KINDS = {"plain": 50, "stream": 20, "n": 5, "pacore": 5, "leave": 10, "malformed": 5, "image": 5}


def body(number: int, kind: str) -> dict:
    """A request of a kind; its number is in its prompt and is its seed."""
    text = f"request {number} " + "x" * (number % 40)
    content: object = text
    if kind == "image":
        image = {"type": "image_url", "image_url": {"url": data_url(photo())}}
        content = [image, {"type": "text", "text": text}]
    fields = {
        "model": "tiny:pacore-3" if kind == "pacore" else "tiny",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 4 + number * 7 % 40,
        "seed": number,
    }
    return fields | ({"n": 3} if kind == "n" else {})


async def send(client: AsyncOpenAI, number: int, kind: str) -> list[str] | None:
    """The texts of a request's choices; None if it left."""
    create, fields = client.chat.completions.create, body(number, kind)
    if kind == "leave":
        try:
            if number % 2:
                async with asyncio.timeout(0.02 * (number % 7)):
                    await create(**fields)
            else:
                async with await create(**fields, stream=True) as stream:
                    await anext(stream)
        except TimeoutError:
            pass
        return None
    if kind == "stream":
        text = ""
        async for chunk in await create(**fields, stream=True):
            for choice in chunk.choices:
                delta = choice.delta
                text += (getattr(delta, "reasoning_content", None) or "") + (delta.content or "")
        return [text]
    answer = await create(**fields)
    messages = [choice.message for choice in answer.choices]
    return [(message.reasoning_content or "") + (message.content or "") for message in messages]


async def soak(server: Running, kinds: list[str]) -> dict[int, list[str] | None]:
    texts: dict[int, list[str] | None] = {}
    url = f"{server.url}/v1"
    async with AsyncOpenAI(base_url=url, api_key="x", max_retries=0, timeout=120) as client:
        gate = asyncio.Semaphore(32)

        async def one(number: int, kind: str) -> None:
            async with gate:
                if kind == "malformed":
                    bad = [b"{", b"[]", b'{"model": "tiny"}', b'{"model": 5}'][number % 4]
                    path = "/v1/chat/completions"
                    reply = await asyncio.to_thread(server.post, path, bad)
                    assert reply.status == 400
                    texts[number] = None
                else:
                    texts[number] = await send(client, number, kind)

        await asyncio.gather(*(one(*item) for item in enumerate(kinds)))
    return texts


def test_soak():
    """A page that leaks, an answer that is lost, doubled or that of another request, a request that
    waits for ever. There is too little KV for all of them."""
    kinds = random.Random(1).choices(list(KINDS), list(KINDS.values()), k=REQUESTS)
    tiny = Step3VL.from_preset("tiny", seed=3)
    engine = engine_for(tiny, kv_tokens=1536, max_running=16)
    with running(Service(tiny, engine, Limits(), Metrics("tiny")), "tiny") as server:
        texts = asyncio.run(soak(server, kinds))
        server.wait_idle()
        metrics = server.get("/metrics").body.decode()
        assert Counter(kinds)["leave"] > 10
        for number, kind in enumerate(kinds):
            if kind in ("leave", "malformed"):
                continue
            found = texts[number]
            assert found and all(found), number
            assert len(found) == (3 if kind == "n" else 1)
        # Each answer alone, on the same server: what was drawn does not depend on the others.
        sample = [number for number, kind in enumerate(kinds) if kind == "plain"][:12]
        for number in sample:
            alone = server.post("/v1/chat/completions", body(number, "plain")).json
            message = alone["choices"][0]["message"]
            said = (message["reasoning_content"] or "") + (message["content"] or "")
            assert texts[number] == [said], number
        ended = sum(
            float(value)
            for value in re.findall(r"^pacore:request_success_total\{.*\} (.*)$", metrics, re.M)
        )
        cancelled = re.search(r"^pacore:requests_cancelled_total\{.*\} (.*)$", metrics, re.M)
        left = Counter(kinds)["leave"]
        answered = REQUESTS - left - Counter(kinds)["malformed"]
        assert answered <= ended <= answered + left  # some that leave have been answered
        assert float(cancelled[1]) <= left
