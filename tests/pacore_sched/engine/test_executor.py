"""The executor on the tiny model, by hand-made batches: every token is the model's own.

`Step3VL.generate` says what each rollout's tokens are. Batches mix groups, prompts in chunks,
drafts and whatever else a scheduler may ask for.
"""

import threading
from collections.abc import Sequence

import pytest
import torch
from PIL import Image
from torch import Tensor

from kernels.runtime.configs import Gpu, assume_gpu, use_config
from model.errors import InputError
from model.step3vl import Step3VL
from model.text.prompt import build_prompt
from model.vision.image import Views, load_image, preprocess
from pacore_sched.engine.engine import Engine
from pacore_sched.engine.executor import ModelExecutor
from pacore_sched.engine.stopping import Stopping
from pacore_sched.sched.prefix_tree import PrefixTree
from pacore_sched.sched.request import Batch, Chunk, Group, Rollout, Sampling, Segment

PROMPT = [*range(1, 71)]  # ends inside its second page
OTHER = [*range(30, 45)]
SAMPLING = Sampling()
GREEDY = Sampling(temperature=0.0)
TOY = Gpu("toy", 90, sms=2, shared_bytes=227 * 1024)  # few programs to interpret


@pytest.fixture(scope="module")
def tiny() -> Step3VL:
    return Step3VL.from_preset("tiny", seed=1)


class Hand:
    """An executor, a tree, and the bookkeeping that a scheduler and an engine do."""

    def __init__(self, model: Step3VL, **options: object) -> None:
        self.model = model
        options = {"num_pages": 40, "max_running": 8} | options
        self.executor = ModelExecutor(model, **options)
        self.tree = PrefixTree(self.executor.num_pages, self.executor.page_size)
        self.free_indices = list(range(self.executor.max_running))

    def write(self, segment: Segment, tokens: int, parent: int | None = None) -> Chunk:
        """The chunk of a segment's next tokens."""
        if segment.node < 0:
            segment.node = self.tree.add(parent)
        start, segment.written = segment.written, segment.written + tokens
        self.tree.append(segment.node, tokens)
        return Chunk(segment, start, segment.written)

    def prompt(self, ids: Sequence[int], parent: int | None = None) -> Segment:
        """A segment, written at once."""
        segment = self.executor.segment(ids)
        self.collect(self.launch(Batch((), (self.write(segment, len(ids), parent),))))
        return segment

    def group(
        self, above: Segment, last: int, seeds: Sequence[int], sampling: Sampling = SAMPLING
    ) -> list[Rollout]:
        """Rollouts in nodes and batch indices of their own."""
        group = Group([above], last, sampling)
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
        """Append the tokens of `decode`, and launch."""
        for rollout, draft in zip(
            batch.decode, batch.drafts or [()] * len(batch.decode), strict=True
        ):
            self.tree.append(rollout.node, 1 + len(draft))
        return batch, self.executor.launch(self.tree, batch)

    def collect(self, launched: tuple[Batch, object]) -> None:
        """Hand out a step's tokens."""
        batch, pending = launched
        tokens, logprobs = self.executor.collect(pending)
        for rollout, token, logprob in zip(batch.sampled, tokens, logprobs, strict=True):
            rollout.tokens.append(token)
            rollout.logprobs.append(logprob)

    def decode(self, rollouts: Sequence[Rollout], steps: int, ahead: bool = False) -> None:
        """The same batch again and again; with `ahead` a step is launched before another's end."""
        batch, flying = Batch(tuple(rollouts)), []
        for _ in range(steps):
            flying.append(self.launch(batch))
            if len(flying) > ahead:
                self.collect(flying.pop(0))
        for launched in flying:
            self.collect(launched)


def check(model: Step3VL, prompt: Sequence[int], *rollouts: Rollout, images: tuple = ()) -> None:
    """Each rollout's tokens are those that the model generates alone, up to where that ends."""
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
def test_one_batch_over_and_over(tiny: Step3VL, ahead: bool, impl: str | None):
    """Rollouts cross a page; with a step in flight, tokens feed the next one unseen by the host."""
    model = tiny if impl is None else Step3VL.from_preset("tiny", seed=1, impl=impl)
    hand = Hand(model)
    above = hand.prompt(PROMPT)
    rollouts = hand.group(above, 7, [11, 12, 13])
    hand.decode(rollouts, 70 if impl is None else 8, ahead)
    check(tiny, PROMPT, *rollouts)
    assert len({tuple(rollout.tokens) for rollout in rollouts}) == 3


def test_rows_are_not_in_the_order_of_the_batch(tiny: Step3VL):
    """Two groups of unlike settings, interleaved and backwards: each gets its own tokens."""
    hand = Hand(tiny)
    first = hand.group(hand.prompt(PROMPT), 7, [1, 2])
    second = hand.group(hand.prompt(OTHER), 9, [3, 4], Sampling(top_k=3, temperature=0.5))
    third = hand.group(first[0].group.path[0], 8, [5], GREEDY)
    mixed = [second[1], third[0], first[1], second[0], first[0]]
    hand.decode(mixed, 6, ahead=True)
    check(tiny, PROMPT, *first, *third)
    check(tiny, OTHER, *second)


def test_membership_changes(tiny: Step3VL):
    """A batch index's next owner starts from its own prompt's last token and its own seed."""
    hand = Hand(tiny, max_running=3)
    above = hand.prompt(PROMPT)
    first = hand.group(above, 7, [1, 2, 3])
    hand.decode(first, 3, ahead=True)
    hand.stop(first[0], first[2])
    hand.decode(first[1:2], 2)
    second = hand.group(above, 9, [4, 5])
    hand.decode([second[1], first[1], second[0]], 4, ahead=True)
    check(tiny, PROMPT, *first, *second)
    assert [len(r.tokens) for r in (*first, *second)] == [3, 9, 3, 4, 4]


def test_prompts_in_chunks_beside_decoding(tiny: Step3VL):
    """A prompt written in four steps while others decode; then all decode together."""
    hand = Hand(tiny)
    first = hand.group(hand.prompt(OTHER), 9, [1, 2])
    segment = hand.executor.segment(PROMPT)
    launched = []
    for tokens in (20, 1, 44, 5):
        launched.append(hand.launch(Batch(tuple(first), (hand.write(segment, tokens),))))
    for each in launched:
        hand.collect(each)
    second = hand.group(segment, 7, [3])
    hand.decode([*first, *second], 5)
    check(tiny, OTHER, *first)
    check(tiny, PROMPT, *second)
    assert hand.executor.stats.steps == 1 + 4 + 5


def test_taken_up_again(tiny: Step3VL):
    """A rollout that lost its pages goes on where it was: known tokens written in two chunks,
    the last of which draws the next one, at another batch index than before."""
    hand = Hand(tiny)
    above = hand.prompt(PROMPT)
    kept, lost = hand.group(above, 7, [1, 2])
    hand.decode([kept, lost], 6)
    hand.stop(lost)
    newcomer = hand.group(above, 7, [3])[0]  # takes the batch index that was lost
    hand.start(lost)
    for start, stop in ((0, 4), (4, 7)):
        hand.tree.append(lost.node, stop - start)
        chunk = Chunk(lost, start, stop, samples=stop == 7)
        hand.collect(hand.launch(Batch((kept, newcomer), (chunk,))))
    hand.decode([lost, kept, newcomer], 3)
    check(tiny, PROMPT, kept, lost, newcomer)
    assert [len(r.tokens) for r in (kept, lost, newcomer)] == [11, 10, 5]


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn])
def test_moved_to_the_host_and_back(tiny: Step3VL, kv_dtype: torch.dtype | None):
    """Pages given to others meanwhile return bit by bit to other places, scales too."""
    hand = Hand(tiny, kv_dtype=kv_dtype)
    above = hand.prompt(PROMPT)
    kept, lost = hand.group(above, 7, [1, 2])
    alone = hand.group(above, 7, [2])[0]  # the same seed, never moved
    hand.decode([kept, lost, alone], 70)
    pages, length = hand.tree.pages(lost.node), hand.tree.length(lost.node)
    held = [x[:, list(pages)].clone() for x in hand.executor.cache._bytes()]
    hand.stop(lost)
    hand.collect(hand.launch(Batch((kept, alone), evicted=((lost, pages),))))
    filler = hand.prompt(OTHER * 6)
    assert set(hand.tree.pages(filler.node)) == set(pages)
    hand.start(lost)
    hand.tree.append(lost.node, length)
    pages = hand.tree.pages(lost.node)
    hand.tree.reserve(lost.node, 100)  # a page more than was moved
    more = hand.tree.pages(lost.node)
    assert len(more) > len(pages)
    hand.collect(hand.launch(Batch((lost, alone, kept), restored=((lost, pages),))))
    for x, before in zip(hand.executor.cache._bytes(), held, strict=True):
        last = length - 64  # tokens of the second page, behind which the step has written
        assert torch.equal(x[:, pages[0]], before[:, 0])
        assert torch.equal(x[:, pages[1], :, :last], before[:, 1, :, :last])
    hand.decode([kept, lost, alone], 3)
    assert alone.tokens[: len(lost.tokens)] == lost.tokens
    if kv_dtype is None:
        check(tiny, PROMPT, kept, lost, alone)


def test_what_ended_on_the_host_is_dropped(tiny: Step3VL):
    """Copies of pages would pile up if cancelled rollouts kept theirs."""
    hand = Hand(tiny)
    rollouts = hand.group(hand.prompt(PROMPT), 7, [1, 2, 3])
    hand.decode(rollouts, 2)
    for rollout in rollouts[:2]:
        pages = hand.tree.pages(rollout.node)
        hand.stop(rollout)
        hand.collect(hand.launch(Batch((rollouts[2],), evicted=((rollout, pages),))))
        rollout.finish_reason = "cancelled"
    assert list(hand.executor._on_host) == rollouts[1:2]


def test_drafts(tiny: Step3VL):
    """Tokens behind a draft are those of decoding as long as it is right, and the next step
    starts from the last one that was kept."""
    hand = Hand(tiny)
    above = hand.prompt(PROMPT)
    plain, drafted, beside = hand.group(above, 7, [1, 1, 2])
    hand.decode([plain], 20)
    hand.decode([drafted, beside], 2)
    told = plain.tokens
    for draft, right in (
        ((told[2], told[3], told[4]), 3),
        ((told[6], told[7] + 1, told[8]), 1),
        ((told[8] + 1,), 0),
        ((), 0),
    ):
        batch, pending = hand.launch(Batch((beside, drafted), drafts=((), draft)))
        tokens, logprobs = hand.executor.collect(pending)
        assert len(tokens) == len(logprobs) == 2 + len(draft)
        beside.tokens.append(tokens[0])
        beside.logprobs.append(logprobs[0])
        drafted.tokens += tokens[1 : 2 + right]
        drafted.logprobs += logprobs[1 : 2 + right]
        hand.tree.truncate(drafted.node, len(drafted.tokens))
        assert drafted.tokens == told[: len(drafted.tokens)]
    hand.decode([drafted, beside], 3, ahead=True)
    check(tiny, PROMPT, drafted, beside)
    assert len(drafted.tokens) == 2 + 4 + 2 + 1 + 1 + 3 and len(beside.tokens) == 2 + 4 + 3
    assert drafted.logprobs == pytest.approx(plain.logprobs[: len(drafted.logprobs)], abs=1e-4)


def asked_about_images(model: Step3VL) -> tuple[list[Views], list[int]]:
    """Two images with a question, and the ids of the prompt."""
    images = [
        preprocess(load_image(Image.effect_noise(size, 60).convert("RGB")), model.config.vision)
        for size in ((640, 300), (40, 50))
    ]
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": parts}]
    return images, build_prompt(messages, model.tokenizer, model.config, images)


def test_images(tiny: Step3VL):
    """A head with the image, a tail with the question, and a second image that begins in the head
    and ends in the tail; chunks cut through the image's rows."""
    images, ids = asked_about_images(tiny)
    patches = [i for i, id in enumerate(ids) if id == tiny.config.tokens.im_patch]
    cut = patches[-2]
    with ModelExecutor(tiny, num_pages=40, max_running=4) as executor:
        hand = Hand(tiny)
        hand.executor = executor
        features = executor.encode(images)
        assert features.count == len(patches)
        head = executor.segment(ids[:cut], features)
        tail = executor.segment(ids[cut:-1], features, len(patches) - 2)
        features.result()
        assert head.ready() and tail.ready()
        middle = patches[3]
        for tokens in (middle, 1, cut - middle - 1):
            hand.launch(Batch((), (hand.write(head, tokens),)))
        hand.launch(Batch((), (hand.write(tail, tail.tokens, head.node),)))
        rollouts = hand.group(tail, ids[-1], [1, 2])
        hand.decode(rollouts, 6)
        check(tiny, ids[:-1], *rollouts, images=tuple(images))
        with pytest.raises(InputError, match=f"has {len(patches) + 1} <im_patch> tokens"):
            executor.segment(ids, features, 1)


def test_the_decoder_is_given_the_same_rows(tiny: Step3VL, monkeypatch: pytest.MonkeyPatch):
    """By `forward`, by `generate`, and by the engine: two prompts in one step, in chunks."""
    asked = [asked_about_images(tiny) for _ in range(2)]
    hole = tiny.config.tokens.im_patch
    seen, decoder = [], tiny.decoder.forward

    def spy(embeddings: Tensor, *step: object) -> Tensor:
        seen.append(embeddings)
        return decoder(embeddings, *step)

    monkeypatch.setattr(tiny.decoder, "forward", spy)
    prompts = []
    for images, ids in asked:
        tiny(ids, images)
        tiny.generate(ids, images, max_tokens=1)
        prompts.append(seen[-1])
        assert torch.equal(seen[-2], seen[-1])
        patches = torch.tensor(ids) == hole
        assert torch.equal(prompts[-1][patches], tiny.encode_images(images))
        text = torch.tensor(ids)[~patches]
        assert torch.equal(prompts[-1][~patches], tiny.decoder.embed(text))
    cut = asked[0][1].index(hole) + 3  # within a crop
    with ModelExecutor(tiny, num_pages=40, max_running=4) as executor:
        hand = Hand(tiny)
        hand.executor = executor
        segments = [executor.segment(ids, executor.encode(images)) for images, ids in asked]
        for start, stop in ((0, cut), (cut, len(prompts[0]))):
            chunks = tuple(hand.write(segment, stop - start) for segment in segments)
            hand.collect(hand.launch(Batch((), chunks)))
            assert torch.equal(seen[-1], torch.cat([prompt[start:stop] for prompt in prompts]))


def test_encoding_beside_decoding(tiny: Step3VL, monkeypatch: pytest.MonkeyPatch):
    """Decoding goes on while the tower is busy; what fails there fails where it is asked for."""
    image = preprocess(load_image(Image.new("RGB", (40, 50))), tiny.config.vision)
    go = threading.Event()

    def fail(views: object) -> None:
        assert go.wait(30)
        raise RuntimeError("no memory for the image")

    with ModelExecutor(tiny, num_pages=40, max_running=4) as executor:
        hand = Hand(tiny)
        hand.executor = executor
        monkeypatch.setattr(tiny, "encode_images", fail)
        features = executor.encode([image])
        segment = executor.segment([tiny.config.tokens.im_patch] * features.count, features)
        assert not segment.ready() and features.error is None
        rollouts = hand.group(hand.prompt(PROMPT), 7, [1])
        hand.decode(rollouts, 3)
        assert not segment.ready()
        go.set()
        with pytest.raises(RuntimeError, match="no memory for the image"):
            features.result()
        assert not segment.ready() and "no memory" in str(features.error)
        with pytest.raises(RuntimeError, match="no memory for the image"):
            hand.launch(Batch((), (hand.write(segment, segment.tokens),)))
    monkeypatch.undo()
    check(tiny, PROMPT, *rollouts)


def test_fp8_pages(tiny: Step3VL):
    """The engine's KV in FP8 says what a whole sequence over FP8 pages says."""
    hand = Hand(tiny, kv_dtype=torch.float8_e4m3fn)
    assert hand.executor.cache.k.dtype == torch.float8_e4m3fn
    rollouts = hand.group(hand.prompt(PROMPT), 7, [1, 2], GREEDY)
    hand.decode(rollouts, 6)
    again = Hand(tiny, kv_dtype=torch.float8_e4m3fn)
    (alone,) = again.group(again.prompt(PROMPT), 7, [1], GREEDY)
    again.decode([alone], 6)
    assert rollouts[0].tokens == rollouts[1].tokens == alone.tokens
    assert rollouts[0].logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_logprobs_are_the_models(tiny: Step3VL):
    """Against one forward over prompt and rollout."""
    hand = Hand(tiny)
    (rollout,) = hand.group(hand.prompt(PROMPT), 7, [5])
    hand.decode([rollout], 10)
    logits = tiny([*PROMPT, 7, *rollout.tokens[:-1]])[len(PROMPT) :]
    expected = logits.log_softmax(-1)[range(len(rollout.tokens)), rollout.tokens]
    assert rollout.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_no_distribution(tiny: Step3VL):
    """Logits of NaN give -1 to their rollout alone, and the step after it, already launched, must
    not look up an embedding -1."""
    hand = Hand(tiny)
    above = hand.prompt(PROMPT)
    broken, sound = hand.group(above, 7, [1, 2])
    batch = Batch((broken, sound))
    hand.collect(hand.launch(batch))
    page = hand.tree.pages(broken.node)[0]
    hand.executor.cache.v[:, page] = torch.nan
    first, second = hand.launch(batch), hand.launch(batch)
    hand.collect(first)
    hand.collect(second)
    assert broken.tokens[1] == -1
    check(tiny, PROMPT, sound)


def test_bad_input(tiny: Step3VL):
    """Ids that the model does not have, images that it does not take, memory that is not there."""
    hand = Hand(tiny)
    patch = tiny.config.tokens.im_patch
    with pytest.raises(InputError, match=r"id -3 of the prompt is not in \[0, "):
        hand.executor.segment([1, -3])
    with pytest.raises(InputError, match="has 2 <im_patch> tokens, the images give 0"):
        hand.executor.segment([1, patch, patch])
    blind = Step3VL.from_preset("tiny", seed=1)
    blind.vision = None
    with pytest.raises(InputError, match="takes no images"):
        Hand(blind).executor.encode([])
    assert Hand(blind).executor.segment([1, patch]).ready()
    with pytest.raises(InputError, match="needs .* GB"):
        ModelExecutor(tiny, min_kv_tokens=10**15)


def test_tokens_that_nobody_knows(tiny: Step3VL):
    """A rollout whose last token is still in flight cannot start at another batch index."""
    hand = Hand(tiny)
    (rollout,) = hand.group(hand.prompt(PROMPT), 7, [1])
    hand.launch(Batch((rollout,)))
    node, rollout.node = rollout.node, hand.tree.add(rollout.group.path[0].node)
    hand.tree.append(rollout.node, 1)
    with pytest.raises(ValueError, match="neither known nor in the table"):
        hand.launch(Batch((rollout,)))
    hand.tree.release(node)
    with pytest.raises(ValueError, match="are not all known"):
        hand.executor.launch(hand.tree, Batch((), (Chunk(rollout, 0, 2, True),)))


def test_statistics(tiny: Step3VL):
    """What was computed, and how the time divides; on a CPU nothing idles."""
    hand = Hand(tiny)
    rollouts = hand.group(hand.prompt(PROMPT), 7, [1, 2])
    hand.decode(rollouts, 4)
    stats = hand.executor.stats
    assert (stats.steps, stats.rows, stats.padding_rows) == (5, len(PROMPT) + 2 * 4, 0)
    assert stats.device_s > stats.host_s > 0 and stats.idle_s == 0


def test_triton(triton_device: str):
    """The Triton form, whose plan moves on by itself: over the turn of a page, and on after the
    pages that the batch began with are full."""
    model, plain = (Step3VL.from_preset("tiny", seed=1, device=triton_device) for _ in range(2))
    hand = Hand(model)
    hand.executor.graphs.enabled = False
    rollouts = hand.group(hand.prompt(OTHER), 7, [1, 2])
    model.set_impl("eager")
    hand.decode(rollouts, 62)
    model.set_impl({"prefix_attention": "triton"})
    before = hand.executor.stats.plans
    with assume_gpu(TOY), use_config("prefix_attention", programs=1):
        hand.decode(rollouts, 4, ahead=True)
    assert hand.executor.stats.plans == before + 2
    check(plain, OTHER, *rollouts)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("speculate", [0, 8])
def test_under_the_engine(tiny: Step3VL, ahead: bool, speculate: int):
    """Everything at once: too few pages for all, so that rollouts are preempted, some to the host;
    long prompts in chunks, two groups of unlike settings, drafts; and their tokens are those of
    `generate`."""
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
        (*OTHER, 9): Sampling(60, temperature=0.7, top_k=2),
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
    assert engine.scheduler.counts.preemptions
    assert engine.stats.accepted or not speculate
    assert engine.scheduler.tree.free_pages == executor.num_pages
