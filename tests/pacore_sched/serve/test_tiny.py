"""The server on the tiny model: its texts are those of `ask`, its scores those of the model."""

import base64
import io
import json
from collections.abc import Iterator

import pytest
import torch
from openai import OpenAI
from PIL import Image

from model.step3vl import Step3VL
from pacore_sched.answers.pacore import Pacore, engine_for
from pacore_sched.sched.request import Sampling
from pacore_sched.serve.images import MediaRules
from pacore_sched.serve.limits import Limits
from pacore_sched.serve.metrics import Metrics
from pacore_sched.serve.service import Service
from tests.pacore_sched.serve.serving import Running, running

SAMPLING = Sampling(max_tokens=12, temperature=0.8, top_k=50, top_p=0.95)
OPTIONS = {"max_tokens": 12, "temperature": 0.8, "top_p": 0.95}
PROMPT = "What is this?"


@pytest.fixture(scope="module")
def tiny() -> Step3VL:
    return Step3VL.from_preset("tiny", seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("photos")
    photo().save(path / "photo.png")
    return path


@pytest.fixture(scope="module")
def server(tiny: Step3VL, folder) -> Iterator[Running]:
    engine = engine_for(tiny, kv_tokens=20_000, max_running=16)
    service = Service(tiny, engine, Limits(max_image_pixels=200_000), Metrics("tiny"))
    with running(service, "tiny", media=MediaRules(local_path=folder)) as found:
        yield found
        found.wait_idle()


@pytest.fixture(scope="module")
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def photo() -> Image.Image:
    return Image.linear_gradient("L").resize((300, 200)).convert("RGB")


def data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def with_image(url: str) -> list[dict]:
    image = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [image, {"type": "text", "text": PROMPT}]}]


def ask(tiny: Step3VL, widths: list[int], images: list = [], seed: int = 7) -> str:  # noqa: B006
    """What `ask` answers, on an engine of its own."""
    from model.vision.image import preprocess

    engine = engine_for(tiny, kv_tokens=20_000, max_running=16)
    pacore = Pacore(tiny, engine, widths, SAMPLING, seed=seed)
    views = [preprocess(image, tiny.config.vision) for image in images]
    content = [{"type": "image"} for _ in views] + [{"type": "text", "text": PROMPT}]
    answer = pacore.answer([{"role": "user", "content": content}], views)
    return answer.rounds[-1].rollouts[0].text


def text_of(message) -> str:
    return (message.reasoning_content or "") + (message.content or "")


def test_same_text_as_ask(client: OpenAI, tiny: Step3VL):
    """Another seed, prompt, template or default in the server than in `ask`."""
    messages = [{"role": "user", "content": PROMPT}]
    options = OPTIONS | {"seed": 7, "extra_body": {"top_k": 50}}
    alone = client.chat.completions.create(model="tiny", messages=messages, **options)
    assert text_of(alone.choices[0].message) == ask(tiny, [])
    pacore = client.chat.completions.create(model="tiny:pacore-3-2", messages=messages, **options)
    assert text_of(pacore.choices[0].message) == ask(tiny, [3, 2])
    other = client.chat.completions.create(
        model="tiny", messages=messages, **(options | {"seed": 8})
    )
    assert text_of(other.choices[0].message) != text_of(alone.choices[0].message)


def test_photo(client: OpenAI, tiny: Step3VL):
    """An image that is lost, resized or put elsewhere; rounds that encode it again."""
    options = OPTIONS | {"seed": 7, "extra_body": {"top_k": 50}}
    messages = with_image(data_url(photo()))
    alone = client.chat.completions.create(model="tiny", messages=messages, **options)
    assert text_of(alone.choices[0].message) == ask(tiny, [], [photo()])
    pacore = client.chat.completions.create(model="tiny:pacore-2", messages=messages, **options)
    assert text_of(pacore.choices[0].message) == ask(tiny, [2], [photo()])
    first, last = (round_["prompt_tokens"] for round_ in pacore.pacore["rounds"])
    # A sibling's prompt, and the image in the synthesis.
    assert pacore.usage.prompt_tokens_details.cached_tokens > first - 1
    local = client.chat.completions.create(
        model="tiny", messages=with_image("photo.png"), **options
    )
    assert text_of(local.choices[0].message) == text_of(alone.choices[0].message)


def test_bad_images(server: Running):
    """A path outside the folder, an image beyond the limit: a line that says so, status 400."""
    large = data_url(Image.new("RGB", (1000, 1000)))
    for url, words in (
        ("/etc/passwd", "the image cannot be used"),
        ("http://127.0.0.1/a.png", "--allowed-media-domains"),
        (large, "200,000"),
        ("data:image/png;base64,@", "data URL"),
    ):
        reply = server.chat(model="tiny", messages=with_image(url))
        error = reply.json["error"]
        assert reply.status == 400 and words in error["message"], error


def test_echo(client: OpenAI, tiny: Step3VL):
    """Scores for evaluation harnesses: shifted by one, of another distribution, without the
    prompt's last token; offsets that do not lead to the tokens' text."""
    text = "Zürich is a city"
    answer = client.completions.create(
        model="tiny", prompt=text, max_tokens=1, echo=True, logprobs=2, temperature=0
    )
    choice = answer.choices[0]
    ids = tiny.tokenizer.encode(text)
    with torch.inference_mode():
        logits = tiny.forward(torch.tensor(ids)).double()
    logprobs = logits.view(len(ids), -1).log_softmax(-1)
    expected = [None, *(logprobs[i, ids[i + 1]].item() for i in range(len(ids) - 1))]
    found = choice.logprobs.token_logprobs
    assert len(found) == len(ids) + 1 == len(choice.logprobs.tokens)
    assert found[0] is None
    assert found[1:-1] == pytest.approx(expected[1:], abs=1e-4)
    assert found[-1] == pytest.approx(logprobs[-1].max().item(), abs=1e-4)
    for position, top in enumerate(choice.logprobs.top_logprobs[1:]):
        assert max(top.values()) == pytest.approx(logprobs[position].max().item(), abs=1e-4)
        assert choice.logprobs.tokens[position + 1] in top
    assert choice.text.startswith(text)
    offsets = choice.logprobs.text_offset
    ascii_tokens = [i for i, token in enumerate(choice.logprobs.tokens) if token.isascii()]
    for i in ascii_tokens:
        token = choice.logprobs.tokens[i]
        assert choice.text[offsets[i] : offsets[i] + len(token)] == token
    alone = client.completions.create(
        model="tiny", prompt=text, max_tokens=0, echo=True, logprobs=2
    )
    assert alone.choices[0].text == text
    assert len(alone.choices[0].logprobs.tokens) == len(ids)
    assert alone.usage.completion_tokens == 0
    control = client.completions.create(
        model="tiny", prompt="<|im_end|>ab", max_tokens=1, echo=True, logprobs=0
    ).choices[0]
    assert control.text.startswith("<|im_end|>ab")
    assert control.logprobs.text_offset[:3] == [0, 10, 11]
    assert control.logprobs.tokens[:3] == ["<|im_end|>", "a", "b"]
    eos = client.completions.create(
        model="tiny", prompt=[tiny.config.tokens.eos[1]], max_tokens=1, echo=True, logprobs=1
    )
    assert len(eos.choices[0].logprobs.tokens) == 2


def test_completions(client: OpenAI, tiny: Step3VL):
    """Prompts or choices swapped; ids read as text; a stream that differs from the whole."""
    prompts = ["abc", "something else"]
    options = {"model": "tiny", "max_tokens": 6, "n": 2, "seed": 3, "logprobs": 1}
    whole = client.completions.create(prompt=prompts, **options)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    ids = [tiny.tokenizer.encode(prompt) for prompt in prompts]
    by_ids = client.completions.create(prompt=ids, **options)
    assert [c.text for c in by_ids.choices] == [c.text for c in whole.choices]
    single = client.completions.create(prompt=prompts[1], **options)
    assert [c.text for c in single.choices] == [c.text for c in whole.choices[2:]]
    texts, tokens = [""] * 4, [[] for _ in range(4)]
    for chunk in client.completions.create(prompt=prompts, stream=True, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert whole.usage.prompt_tokens == sum(map(len, ids))


def test_top_logprobs(client: OpenAI):
    """Alternatives that are missing, unsorted, or those of another position."""
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=4, temperature=0,
        logprobs=True, top_logprobs=3,
    )  # fmt: skip
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 4
    for entry in entries:
        values = [top.logprob for top in entry.top_logprobs]
        assert len(values) == 3 and values == sorted(values, reverse=True)
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert values[0] == pytest.approx(entry.logprob, abs=1e-5)


def test_tokenize(server: Running, client: OpenAI, tiny: Step3VL):
    """Counts that differ from what a prompt costs; a round trip that changes text."""
    tokens = server.post("/tokenize", {"prompt": "Zürich"}).json
    assert tokens["tokens"] == tiny.tokenizer.encode("Zürich")
    assert tokens["count"] == len(tokens["tokens"]) == 7
    text = server.post("/detokenize", {"tokens": tokens["tokens"]}).json["prompt"]
    assert text == "Zürich"
    messages = [{"role": "user", "content": "How long?"}]
    count = server.post("/tokenize", {"messages": messages}).json["count"]
    usage = client.chat.completions.create(model="tiny", messages=messages, max_tokens=1).usage
    assert count == usage.prompt_tokens
    assert server.post("/tokenize", {}).status == 400
    for body in ({"prompt": "\ud800"}, {"prompt": "x" * 2**20 + "x"}, {"messages": []}):
        assert server.post("/tokenize", body).status == 400
    assert server.post("/detokenize", {"tokens": [10**9]}).status == 400


BAD = {
    "an empty prompt": {"prompt": ""},
    "no prompts": {"prompt": []},
    "an id outside": {"prompt": [10**7]},
    "an image's id": {"prompt": "<im_patch>"},
    "a long prompt": {"prompt": "x" * 10_000},
    "half a pair": {"prompt": "\ud800"},
    "half a pair in a list": {"prompt": ["a", "\ud800"]},
    "mixed": {"prompt": ["a", 1]},
    "nothing asked": {"prompt": "a", "max_tokens": 0},
    "pacore": {"prompt": "a", "model": "tiny:pacore-2"},
    "suffix": {"prompt": "a", "suffix": "b"},
    "many": {"prompt": ["a"] * 257},
    "wide": {"prompt": ["a"], "n": 129},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_completions(server: Running, case: str):
    reply = server.post("/v1/completions", {"model": "tiny", **BAD[case]})
    assert reply.status == 400, reply.body
    error = json.loads(reply.body)["error"]
    too_long = "context_length_exceeded" if case == "a long prompt" else None
    assert error["message"] and error["code"] in (too_long, "unsupported_parameter")
