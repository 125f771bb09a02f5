"""/v1/responses on the tiny model: its texts are those of chat."""

from collections.abc import Iterator

import pytest
from openai import OpenAI

from model.step3vl import Step3VL
from pacore_sched.answers.pacore import engine_for
from pacore_sched.serve.limits import Limits
from pacore_sched.serve.metrics import Metrics
from pacore_sched.serve.service import Service
from tests.pacore_sched.serve.serving import running
from tests.pacore_sched.serve.test_tiny import PROMPT, data_url, photo, text_of, with_image

SAME = {"temperature": 0.8, "top_p": 0.95}
EXTRA = {"seed": 7, "top_k": 50}


@pytest.fixture(scope="module")
def client() -> Iterator[OpenAI]:
    tiny = Step3VL.from_preset("tiny", seed=3)
    service = Service(tiny, engine_for(tiny, kv_tokens=20_000, max_running=16), Limits(),
                      Metrics("tiny"))  # fmt: skip
    with running(service, "tiny") as server:
        yield OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        server.wait_idle()


@pytest.mark.parametrize("model", ["tiny", "tiny:pacore-2"])
def test_same_text_as_chat(client: OpenAI, model: str):
    """An image that is lost, another seed, or an option that does not arrive."""
    chat = client.chat.completions.create(
        model=model, messages=with_image(data_url(photo())), max_tokens=12, extra_body=EXTRA, **SAME
    )
    image = {"type": "input_image", "image_url": data_url(photo()), "detail": "auto"}
    question = [{"role": "user", "content": [image, {"type": "input_text", "text": PROMPT}]}]
    options = {"model": model, "input": question, "max_output_tokens": 12, "extra_body": EXTRA}
    answer = client.responses.create(**options, **SAME)
    written = [part.text for item in answer.output for part in item.content]
    assert "".join(written) == text_of(chat.choices[0].message)
    usage = answer.usage
    assert usage.input_tokens == chat.usage.prompt_tokens
    assert usage.output_tokens == chat.usage.completion_tokens
    text = client.responses.create(model=model, input=PROMPT, max_output_tokens=12)
    assert usage.input_tokens > text.usage.input_tokens
    streamed = ""
    for event in client.responses.create(**options, **SAME, stream=True):
        if event.type.endswith("_text.delta"):
            streamed += event.delta
    assert streamed == "".join(written)
