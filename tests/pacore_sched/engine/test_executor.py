"""The executor on the tiny model with hand-built batches: every token is the model's own.

`Step3VL.generate` gives each rollout's expected tokens. Batches mix groups, prompts in chunks,
drafts and anything else that a scheduler may request.
"""

import threading
from collections.abc import Sequence

import pytest
import torch
from PIL import Image
from torch import Tensor

from kernels.prefix_attention import portable
from kernels.runtime.configs import Gpu, assume_gpu, use_config
from model.decoder import Step
from model.errors import InputError
from model.kv_cache import PAGE_SIZE
from model.step3vl import Step3VL
from model.text.prompt import build_prompt
from model.vision.image import Views, load_image, preprocess
from pacore_sched.engine.engine import Engine
from pacore_sched.engine.executor import ModelExecutor
from pacore_sched.engine.stopping import Stopping
from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.request import Batch, Chunk, Group, Rollout, Sampling, Segment
from tests.support.errors import max_error

PROMPT = [*range(1, 71)]  # ends inside its second page
OTHER = [*range(30, 45)]
SAMPLING = Sampling()
GREEDY = Sampling(temperature=0.0)
TOY = Gpu("toy", 90, sms=2, shared_bytes=227 * 1024)  # two SMs: few programs to interpret


@pytest.fixture(scope="module")
def tiny() -> Step3VL:
    return Step3VL.from_preset("tiny", seed=1)


class ManualEngine:
    """An executor and a tree, with the bookkeeping of a scheduler and an engine done by hand."""

    def __init__(self, model: Step3VL, **options: object) -> None:
        self.model = model
        options = {"num_pages": 40, "max_running": 8} | options
        self.executor = ModelExecutor(model, **options)
        self.tree = PrefixTree(self.executor.num_pages, self.executor.page_size)
        self.free_indices = list(range(self.executor.max_running))

    def write(self, segment: Segment, tokens: int, parent: int | None = None) -> Chunk:
        """The chunk of a segment's next `tokens` tokens."""
        if segment.node < 0:
            segment.node = self.tree.add(parent)
        start, segment.written = segment.written, segment.written + tokens
        self.tree.append(segment.node, tokens)
        return Chunk(segment, start, segment.written)

    def prompt(self, ids: Sequence[int], parent: int | None = None) -> Segment:
        """A segment, written in one step."""
        segment = self.executor.segment(ids)
        self.collect(self.launch(Batch((), (self.write(segment, len(ids), parent),))))
        return segment

    def group(
        self, prompt: Segment, last: int, seeds: Sequence[int], sampling: Sampling = SAMPLING
    ) -> list[Rollout]:
        """Rollouts over a prompt, each with its node and batch index."""
        group = Group([prompt], last, sampling)
        group.rollouts = [Rollout(group, i, seed, 512) for i, seed in enumerate(seeds)]
        for rollout in group.rollouts:
            self.start(rollout)
        return group.rollouts

    def start(self, rollout: Rollout) -> None:
        rollout.node = self.tree.add(rollout.group.path[-1].node)
        rollout.batch_index = self.free_indices.pop(0)

    def stop(self, *rollouts: Rollout) -> None:
        for rollout in rollouts:
            self.tree.release(rollout.node)
            self.free_indices.insert(0, rollout.batch_index)
            rollout.node = rollout.batch_index = -1

    def launch(self, batch: Batch) -> tuple[Batch, object]:
        """Append the tokens of `decode`, and launch the step."""
        for rollout, draft in zip(
            batch.decode, batch.drafts or [()] * len(batch.decode), strict=True
        ):
            self.tree.append(rollout.node, 1 + len(draft))
        return batch, self.executor.launch(self.tree, batch)

    def collect(self, launched: tuple[Batch, object]) -> None:
        """Append a step's tokens to their rollouts."""
        batch, pending = launched
        tokens, logprobs, _ = self.executor.collect(pending)
        for rollout, token, logprob in zip(batch.sampled, tokens, logprobs, strict=True):
            rollout.tokens.append(token)
            rollout.logprobs.append(logprob)

    def decode(self, rollouts: Sequence[Rollout], steps: int, ahead: bool = False) -> None:
        """Run the same batch repeatedly; with `ahead`, launch a step before the previous one is
        collected."""
        batch, in_flight = Batch(tuple(rollouts)), []
        for _ in range(steps):
            in_flight.append(self.launch(batch))
            if len(in_flight) > ahead:
                self.collect(in_flight.pop(0))
        for launched in in_flight:
            self.collect(launched)


def check(model: Step3VL, prompt: Sequence[int], *rollouts: Rollout, images: tuple = ()) -> None:
    """Each rollout's tokens are those that the model generates alone, as far as those go."""
    for rollout in rollouts:
        sampling = rollout.group.sampling
        expected = model.generate(
            [*prompt, rollout.group.last_token],
            images,
            max_tokens=len(rollout.tokens),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=rollout.seed,
        )
        assert rollout.tokens[: len(expected)] == expected, rollout.index
        assert len(rollout.tokens) == len(rollout.logprobs)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("impl", [None, "eager"])
def test_one_batch_repeatedly(tiny: Step3VL, ahead: bool, impl: str | None):
    """Rollouts cross a page; with a step in flight, tokens feed the next one without the host.

    Also guards plans rebuilt in every step: only the definition of attention needs that.
    """
    model = tiny if impl is None else Step3VL.from_preset("tiny", seed=1, impl=impl)
    engine = ManualEngine(model)
    prompt = engine.prompt(PROMPT)
    rollouts = engine.group(prompt, 7, [11, 12, 13])
    before, steps = engine.executor.stats.plans, 70 if impl is None else 8
    engine.decode(rollouts, steps, ahead)
    plans = engine.executor.stats.plans - before
    assert plans == steps if impl == "eager" else plans <= 2
    check(tiny, PROMPT, *rollouts)
    assert len({tuple(rollout.tokens) for rollout in rollouts}) == 3


def test_rollouts_of_exactly_full_pages(tiny: Step3VL, monkeypatch: pytest.MonkeyPatch):
    """Guards the last step before a rollout needs a page that it does not have yet, where a section
    of attention is full, too: the plan advances past it, but is not used again."""
    monkeypatch.setattr(portable, "SECTION_TOKENS", PAGE_SIZE)
    engine = ManualEngine(tiny)
    rollouts = engine.group(engine.prompt(PROMPT), 7, [11])
    engine.decode(rollouts, 2 * PAGE_SIZE + 2)
    check(tiny, PROMPT, *rollouts)


def test_another_impl_while_a_batch_repeats(tiny: Step3VL):
    """Guards attention by its definition over a plan that has advanced only on the device."""
    model = Step3VL.from_preset("tiny", seed=1)
    engine = ManualEngine(model)
    rollouts = engine.group(engine.prompt(PROMPT), 7, [11, 12])
    batch = Batch(tuple(rollouts))
    for step in range(30):
        if step == 10:
            model.set_impl("eager")
        engine.collect(engine.launch(batch))
    check(tiny, PROMPT, *rollouts)


def test_rows_are_not_in_the_order_of_the_batch(tiny: Step3VL):
    """Two groups with different sampling parameters, interleaved and reversed: each gets its own
    tokens."""
    engine = ManualEngine(tiny)
    first = engine.group(engine.prompt(PROMPT), 7, [1, 2])
    second = engine.group(engine.prompt(OTHER), 9, [3, 4], Sampling(top_k=3, temperature=0.5))
    third = engine.group(first[0].group.path[0], 8, [5], GREEDY)
    mixed = [second[1], third[0], first[1], second[0], first[0]]
    engine.decode(mixed, 6, ahead=True)
    check(tiny, PROMPT, *first, *third)
    check(tiny, OTHER, *second)


def test_membership_changes(tiny: Step3VL):
    """A batch index's next owner starts from its own prompt's last token and its own seed."""
    engine = ManualEngine(tiny, max_running=3)
    prompt = engine.prompt(PROMPT)
    first = engine.group(prompt, 7, [1, 2, 3])
    engine.decode(first, 3, ahead=True)
    engine.stop(first[0], first[2])
    engine.decode(first[1:2], 2)
    second = engine.group(prompt, 9, [4, 5])
    engine.decode([second[1], first[1], second[0]], 4, ahead=True)
    check(tiny, PROMPT, *first, *second)
    assert [len(r.tokens) for r in (*first, *second)] == [3, 9, 3, 4, 4]


def test_prompts_in_chunks_while_others_decode(tiny: Step3VL):
    """A prompt is written in four steps while others decode; then all decode together."""
    engine = ManualEngine(tiny)
    first = engine.group(engine.prompt(OTHER), 9, [1, 2])
    segment = engine.executor.segment(PROMPT)
    launched = []
    for tokens in (20, 1, 44, 5):
        launched.append(engine.launch(Batch(tuple(first), (engine.write(segment, tokens),))))
    for step in launched:
        engine.collect(step)
    second = engine.group(segment, 7, [3])
    engine.decode([*first, *second], 5)
    check(tiny, OTHER, *first)
    check(tiny, PROMPT, *second)
    assert engine.executor.stats.steps == 1 + 4 + 5


def test_resuming_a_preempted_rollout(tiny: Step3VL):
    """A preempted rollout continues where it stopped: its tokens are written in two chunks, the
    last of which samples the next one, at a different batch index."""
    engine = ManualEngine(tiny)
    prompt = engine.prompt(PROMPT)
    other, preempted = engine.group(prompt, 7, [1, 2])
    engine.decode([other, preempted], 6)
    engine.stop(preempted)
    newcomer = engine.group(prompt, 7, [3])[0]  # takes the preempted rollout's batch index
    engine.start(preempted)
    for start, stop in ((0, 4), (4, 7)):
        engine.tree.append(preempted.node, stop - start)
        chunk = Chunk(preempted, start, stop, samples=stop == 7)
        engine.collect(engine.launch(Batch((other, newcomer), (chunk,))))
    engine.decode([preempted, other, newcomer], 3)
    check(tiny, PROMPT, other, preempted, newcomer)
    assert [len(r.tokens) for r in (other, preempted, newcomer)] == [11, 10, 5]


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn])
def test_moved_to_the_host_and_back(tiny: Step3VL, kv_dtype: torch.dtype | None):
    """Pages that others used meanwhile are restored bit by bit to different pages, scales too."""
    engine = ManualEngine(tiny, kv_dtype=kv_dtype)
    prompt = engine.prompt(PROMPT)
    other, preempted = engine.group(prompt, 7, [1, 2])
    alone = engine.group(prompt, 7, [2])[0]  # the same seed, never moved
    engine.decode([other, preempted, alone], 70)
    pages, length = engine.tree.pages(preempted.node), engine.tree.length(preempted.node)
    before_move = [x[:, list(pages)].clone() for x in engine.executor.cache._bytes()]
    engine.stop(preempted)
    engine.collect(engine.launch(Batch((other, alone), evicted=((preempted, pages),))))
    filler = engine.prompt(OTHER * 6)
    assert set(engine.tree.pages(filler.node)) == set(pages)
    engine.start(preempted)
    engine.tree.append(preempted.node, length)
    pages = engine.tree.pages(preempted.node)
    engine.tree.reserve(preempted.node, 100)  # one page more than was moved
    more = engine.tree.pages(preempted.node)
    assert len(more) > len(pages)
    engine.collect(engine.launch(Batch((preempted, alone, other), restored=((preempted, pages),))))
    for x, before in zip(engine.executor.cache._bytes(), before_move, strict=True):
        last = length - 64  # moved tokens in the second page; the step wrote after them
        assert torch.equal(x[:, pages[0]], before[:, 0])
        assert torch.equal(x[:, pages[1], :, :last], before[:, 1, :, :last])
    engine.decode([other, preempted, alone], 3)
    assert alone.tokens[: len(preempted.tokens)] == preempted.tokens
    if kv_dtype is None:
        check(tiny, PROMPT, other, preempted, alone)


def test_host_copies_of_ended_rollouts_are_dropped(tiny: Step3VL):
    """Guards against a leak: cancelled rollouts must not keep copies of their pages."""
    engine = ManualEngine(tiny)
    rollouts = engine.group(engine.prompt(PROMPT), 7, [1, 2, 3])
    engine.decode(rollouts, 2)
    for rollout in rollouts[:2]:
        pages = engine.tree.pages(rollout.node)
        engine.stop(rollout)
        engine.collect(engine.launch(Batch((rollouts[2],), evicted=((rollout, pages),))))
        rollout.finish_reason = "cancelled"
    assert list(engine.executor._on_host) == rollouts[1:2]


def test_drafts(tiny: Step3VL):
    """Tokens sampled after a draft equal plain decoding's as long as the draft is right, and the
    next step starts from the last accepted one."""
    engine = ManualEngine(tiny)
    prompt = engine.prompt(PROMPT)
    plain, drafted, other = engine.group(prompt, 7, [1, 1, 2])
    engine.decode([plain], 20)
    engine.decode([drafted, other], 2)
    expected = plain.tokens
    for draft, right in (
        ((expected[2], expected[3], expected[4]), 3),
        ((expected[6], expected[7] + 1, expected[8]), 1),
        ((expected[8] + 1,), 0),
        ((), 0),
    ):
        batch, pending = engine.launch(Batch((other, drafted), drafts=((), draft)))
        tokens, logprobs, _ = engine.executor.collect(pending)
        assert len(tokens) == len(logprobs) == 2 + len(draft)
        other.tokens.append(tokens[0])
        other.logprobs.append(logprobs[0])
        drafted.tokens += tokens[1 : 2 + right]
        drafted.logprobs += logprobs[1 : 2 + right]
        engine.tree.truncate(drafted.node, len(drafted.tokens))
        assert drafted.tokens == expected[: len(drafted.tokens)]
    engine.decode([drafted, other], 3, ahead=True)
    check(tiny, PROMPT, drafted, other)
    assert len(drafted.tokens) == 2 + 4 + 2 + 1 + 1 + 3 and len(other.tokens) == 2 + 4 + 3
    assert drafted.logprobs == pytest.approx(plain.logprobs[: len(drafted.logprobs)], abs=1e-4)


def image_prompt(model: Step3VL) -> tuple[list[Views], list[int]]:
    """Two images with a question, and the prompt's ids."""
    images = [
        preprocess(load_image(Image.effect_noise(size, 60).convert("RGB")), model.config.vision)
        for size in ((640, 300), (40, 50))
    ]
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": parts}]
    return images, build_prompt(messages, model.tokenizer, model.config, images)


def test_images(tiny: Step3VL):
    """A head with the image, a tail with the question, and a second image that begins in the head
    and ends in the tail; chunk boundaries are inside the images' rows."""
    images, ids = image_prompt(tiny)
    patches = [i for i, id in enumerate(ids) if id == tiny.config.tokens.im_patch]
    cut = patches[-2]
    with ModelExecutor(tiny, num_pages=40, max_running=4) as executor:
        engine = ManualEngine(tiny)
        engine.executor = executor
        features = executor.encode(images)
        assert features.count == len(patches)
        head = executor.segment(ids[:cut], features)
        tail = executor.segment(ids[cut:-1], features, len(patches) - 2)
        features.result()
        assert head.ready() and tail.ready()
        middle = patches[3]
        for tokens in (middle, 1, cut - middle - 1):
            engine.launch(Batch((), (engine.write(head, tokens),)))
        engine.launch(Batch((), (engine.write(tail, tail.tokens, head.node),)))
        rollouts = engine.group(tail, ids[-1], [1, 2])
        engine.decode(rollouts, 6)
        check(tiny, ids[:-1], *rollouts, images=tuple(images))
        with pytest.raises(InputError, match=f"has {len(patches) + 1} <im_patch> tokens"):
            executor.segment(ids, features, 1)


def test_the_decoder_gets_the_same_rows(tiny: Step3VL, monkeypatch: pytest.MonkeyPatch):
    """`forward`, `generate` and the engine feed the decoder the same rows: two prompts in one step,
    in chunks. The engine encodes each image alone, the others those of a prompt together."""
    prompts_with_images = [image_prompt(tiny) for _ in range(2)]
    placeholder_id = tiny.config.tokens.im_patch
    seen, decoder = [], tiny.decoder.forward

    def spy(embeddings: Tensor, *step: object) -> Tensor:
        seen.append(embeddings)
        return decoder(embeddings, *step)

    monkeypatch.setattr(tiny.decoder, "forward", spy)
    prompts = []
    for images, ids in prompts_with_images:
        tiny(ids, images)
        tiny.generate(ids, images, max_tokens=1)
        prompts.append(seen[-1].clone())
        assert torch.equal(seen[-2], seen[-1])
        patches = torch.tensor(ids) == placeholder_id
        assert torch.equal(prompts[-1][patches], tiny.encode_images(images))
        alone = torch.cat([tiny.vision(image.all) for image in images])
        assert max_error(prompts[-1][patches], alone) < 1e-5
        prompts[-1][patches] = alone
        text = torch.tensor(ids)[~patches]
        assert torch.equal(prompts[-1][~patches], tiny.decoder.embed(text))
    cut = prompts_with_images[0][1].index(placeholder_id) + 3  # within a crop
    with ModelExecutor(tiny, num_pages=40, max_running=4) as executor:
        engine = ManualEngine(tiny)
        engine.executor = executor
        segments = [
            executor.segment(ids, executor.encode(images)) for images, ids in prompts_with_images
        ]
        for start, stop in ((0, cut), (cut, len(prompts[0]))):
            chunks = tuple(engine.write(segment, stop - start) for segment in segments)
            engine.collect(engine.launch(Batch((), chunks)))
            assert torch.equal(seen[-1], torch.cat([prompt[start:stop] for prompt in prompts]))


def test_encoding_while_decoding(tiny: Step3VL, monkeypatch: pytest.MonkeyPatch):
    """Decoding continues while the tower is busy; an encoding error is raised where its result is
    used."""
    image = preprocess(load_image(Image.new("RGB", (40, 50))), tiny.config.vision)
    go = threading.Event()

    def fail(views: object, between: object) -> None:
        assert go.wait(30)
        raise RuntimeError("no memory for the image")

    with ModelExecutor(tiny, num_pages=40, max_running=4) as executor:
        engine = ManualEngine(tiny)
        engine.executor = executor
        monkeypatch.setattr(tiny.vision, "forward", fail)
        features = executor.encode([image])
        segment = executor.segment([tiny.config.tokens.im_patch] * features.count, features)
        assert not segment.ready() and features.error is None
        rollouts = engine.group(engine.prompt(PROMPT), 7, [1])
        engine.decode(rollouts, 3)
        assert not segment.ready()
        go.set()
        with pytest.raises(RuntimeError, match="no memory for the image"):
            features.result()
        assert not segment.ready() and "no memory" in str(features.error)
        with pytest.raises(RuntimeError, match="no memory for the image"):
            engine.launch(Batch((), (engine.write(segment, segment.tokens),)))
    monkeypatch.undo()
    check(tiny, PROMPT, *rollouts)


def test_fp8_pages(tiny: Step3VL):
    """The engine over FP8 KV gives the tokens of a whole sequence over FP8 KV."""
    engine = ManualEngine(tiny, kv_dtype=torch.float8_e4m3fn)
    assert engine.executor.cache.k.dtype == torch.float8_e4m3fn
    rollouts = engine.group(engine.prompt(PROMPT), 7, [1, 2], GREEDY)
    engine.decode(rollouts, 6)
    again = ManualEngine(tiny, kv_dtype=torch.float8_e4m3fn)
    (alone,) = again.group(again.prompt(PROMPT), 7, [1], GREEDY)
    again.decode([alone], 6)
    assert rollouts[0].tokens == rollouts[1].tokens == alone.tokens
    assert rollouts[0].logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def check_logprobs(model: Step3VL, prompt: Sequence[int], rollout: Rollout) -> None:
    """A rollout's log-probabilities are those of one forward pass over prompt and rollout. Its
    sampling may have a top-k, but no top-p."""
    sampling = rollout.group.sampling
    ids = torch.tensor([*prompt, rollout.group.last_token, *rollout.tokens[:-1]])
    cache = model.new_cache(len(ids) // PAGE_SIZE + 1)
    with torch.inference_mode():  # not `model(ids)`: an <im_patch> id may have been drawn
        step = Step.of_sequence(0, len(ids), cache)
        hidden = model.decoder(model.decoder.embed(ids), step, cache)
        z = model.decoder.logits(hidden[len(prompt) :]).double()
    if sampling.logprobs == "processed":
        k = 1 if sampling.temperature == 0 else sampling.top_k or z.shape[1]
        z = z / (sampling.temperature or 1)
        z = z.masked_fill(z < z.topk(k).values[:, -1:], -torch.inf)
    expected = z.log_softmax(-1)[range(len(rollout.tokens)), rollout.tokens]
    assert rollout.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_logprobs_are_the_models(tiny: Step3VL):
    """Log-probabilities of the wrong kind or of another rollout: alone, and in one batch with other
    settings."""
    engine = ManualEngine(tiny)
    segment = engine.prompt(PROMPT)
    samplings = [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=0.5, logprobs="processed"),
        Sampling(temperature=0.5, top_k=3, logprobs="processed"),
        Sampling(temperature=0.0, logprobs="processed"),
    ]
    rollouts = [r for s in samplings for r in engine.group(segment, 7, [5], s)]
    for batch in ([rollout] for rollout in rollouts):
        engine.decode(batch, 5)
    engine.decode(rollouts[::-1], 5)
    for rollout in rollouts:
        check_logprobs(tiny, PROMPT, rollout)
    assert rollouts[1].tokens == rollouts[2].tokens and rollouts[4].logprobs == [0.0] * 10


def test_nan_logits(tiny: Step3VL):
    """Logits of NaN give -1 to their rollout only, and the next step, already launched, must not
    look up embedding -1."""
    engine = ManualEngine(tiny)
    prompt = engine.prompt(PROMPT)
    broken, sound = engine.group(prompt, 7, [1, 2])
    batch = Batch((broken, sound))
    engine.collect(engine.launch(batch))
    page = engine.tree.pages(broken.node)[0]
    engine.executor.cache.v[:, page] = torch.nan
    first, second = engine.launch(batch), engine.launch(batch)
    engine.collect(first)
    engine.collect(second)
    assert broken.tokens[1] == -1
    check(tiny, PROMPT, sound)


def test_bad_input(tiny: Step3VL):
    """Ids outside the vocabulary, images for a model without a tower, and KV larger than memory."""
    engine = ManualEngine(tiny)
    patch = tiny.config.tokens.im_patch
    with pytest.raises(InputError, match=r"prompt id -3 is not in \[0, "):
        engine.executor.segment([1, -3])
    with pytest.raises(InputError, match="has 2 <im_patch> tokens, but the images need 0"):
        engine.executor.segment([1, patch, patch])
    text_only = Step3VL.from_preset("tiny", seed=1)
    text_only.vision = None
    with pytest.raises(InputError, match="takes no images"):
        ManualEngine(text_only).executor.encode([])
    assert ManualEngine(text_only).executor.segment([1, patch]).ready()
    with pytest.raises(InputError, match="needs .* GB"):
        ModelExecutor(tiny, min_kv_tokens=10**15)


def test_unknown_tokens_are_refused(tiny: Step3VL):
    """A rollout whose last token is still in flight cannot start at another batch index."""
    engine = ManualEngine(tiny)
    (rollout,) = engine.group(engine.prompt(PROMPT), 7, [1])
    engine.launch(Batch((rollout,)))
    node, rollout.node = rollout.node, engine.tree.add(rollout.group.path[0].node)
    engine.tree.append(rollout.node, 1)
    with pytest.raises(ValueError, match="neither known nor on the device"):
        engine.launch(Batch((rollout,)))
    engine.tree.release(node)
    with pytest.raises(ValueError, match="are not all known"):
        engine.executor.launch(engine.tree, Batch((), (Chunk(rollout, 0, 2, True),)))


def test_statistics(tiny: Step3VL):
    """Counts of steps and rows, and how the time divides; on a CPU nothing idles."""
    engine = ManualEngine(tiny)
    rollouts = engine.group(engine.prompt(PROMPT), 7, [1, 2])
    engine.decode(rollouts, 4)
    stats = engine.executor.stats
    assert (stats.steps, stats.rows, stats.padding_rows) == (5, len(PROMPT) + 2 * 4, 0)
    assert stats.device_s > stats.host_s > 0 and stats.idle_s == 0


def test_triton(triton_device: str):
    """The Triton impl, whose plan advances by itself: over a page boundary, and beyond the pages
    that the batch started with."""
    model, plain = (Step3VL.from_preset("tiny", seed=1, device=triton_device) for _ in range(2))
    engine = ManualEngine(model)
    engine.executor.graphs.enabled = False
    rollouts = engine.group(engine.prompt(OTHER), 7, [1, 2])
    model.set_impl("eager")
    engine.decode(rollouts, 62)
    model.set_impl({"prefix_attention": "triton"})
    before = engine.executor.stats.plans
    with assume_gpu(TOY), use_config("prefix_attention", programs=1):
        engine.decode(rollouts, 4, ahead=True)
    assert engine.executor.stats.plans == before + 2
    check(plain, OTHER, *rollouts)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("speculate", [0, 8])
def test_under_the_engine(tiny: Step3VL, ahead: bool, speculate: int):
    """Everything together: too few pages for all, so that rollouts are preempted, some to the host;
    long prompts in chunks, two groups with different sampling parameters, drafts. The tokens are
    those of `generate`."""
    executor = ModelExecutor(tiny, num_pages=8, max_running=6)
    eos = tiny.config.tokens.eos
    engine = Engine(
        executor,
        Stopping(tiny.tokenizer, eos),
        token_budget=32,
        ahead=ahead,
        speculate=speculate,
        host_pages=2,
    )
    prompts = {
        (*PROMPT, 7): Sampling(90, ignore_eos=True),
        (*OTHER, 9): Sampling(60, temperature=0.7, top_k=2, logprobs="processed"),
    }
    groups = [
        engine.submit([executor.segment(ids[:-1])], ids[-1], dict(enumerate(range(5))), sampling)
        for ids, sampling in prompts.items()
    ]
    while engine.busy:
        engine.step()
        engine.scheduler.check_integrity()
    for ids, group in zip(prompts, groups, strict=True):
        assert {r.finish_reason for r in group.rollouts} <= {"stop", "length"}
        for rollout in group.rollouts:
            check(tiny, ids[:-1], rollout)
            check_logprobs(tiny, ids[:-1], rollout)
    assert engine.scheduler.counts.preemptions
    assert engine.stats.accepted or not speculate
    assert engine.scheduler.tree.free_pages == executor.num_pages


def test_reset(tiny: Step3VL):
    """After a reset, node numbers begin again: a stale owner in LastTokens, or a cached batch,
    would feed the next rollouts the tokens of the ones before."""
    prompt = [9, 8, 7, 6, 5]

    def tokens(executor: ModelExecutor, ids: list[int]) -> list[list[int]]:
        engine = Engine(executor, Stopping(tiny.tokenizer, ()), ahead=False)
        seeds = {0: 1, 1: 2}
        group = engine.submit([executor.segment(ids[:-1])], ids[-1], seeds, Sampling(max_tokens=6))
        for _ in range(4):
            engine.step()
        return [list(rollout.tokens) for rollout in group.rollouts]

    used = ModelExecutor(tiny, num_pages=40, max_running=8)
    tokens(used, [5, 6, 7])
    used.reset()
    assert tokens(used, prompt) == tokens(ModelExecutor(tiny, num_pages=40, max_running=8), prompt)
