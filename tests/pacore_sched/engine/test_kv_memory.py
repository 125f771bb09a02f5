"""The number of KV pages that fit in memory, and the error when too few do."""

import pytest
import torch

from model.config import PRESETS
from model.errors import InputError
from model.kv_cache import PAGE_SIZE, KVCache, page_bytes
from model.memory import prefill_bytes
from model.step3vl import Step3VL
from pacore_sched.answers.pacore import engine_for
from pacore_sched.engine import kv_memory
from pacore_sched.engine.kv_memory import image_budget, pages_that_fit

TINY = PRESETS["tiny"].decoder
LARGE = PRESETS["step3-vl-10b"].decoder
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def a_free_gigabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_memory, "free_bytes", lambda device: 10**9)


def fit(config=LARGE, dtype=torch.bfloat16, device=CPU, **options) -> int:
    return pages_that_fit(config, device=device, dtype=dtype, **{"max_kv_tokens": 10**9} | options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_page_is_what_a_cache_takes(dtype: torch.dtype):
    """Guards against an estimate without layers or scales, which would run out of memory or waste
    it."""
    one, two = (KVCache(TINY, pages, dtype=dtype) for pages in (1, 2))

    def size(cache: KVCache) -> int:
        tensors = (cache.k, cache.v, cache.k_scale, cache.v_scale)
        return sum(x.nbytes for x in tensors if x is not None)

    assert size(two) - size(one) == size(one) == page_bytes(TINY, dtype)


def test_a_share_of_free_memory():
    """147,456 bytes for a token of the 10B model in bf16; a smaller share of a CPU's memory, which
    others use too."""
    page = PAGE_SIZE * 147_456
    assert fit() == 5 * 10**8 // page
    assert fit(device=torch.device("cuda")) == 9 * 10**8 // page
    assert fit(share=1.0) == 10**9 // page
    assert fit(dtype=torch.float8_e4m3fn, share=1.0) == 10**9 // (page * 33 // 64)


def test_image_embeddings_have_their_part():
    """Embeddings outside the plan: 25 MB per image next to a KV cache that takes all the memory."""
    config, text_only = PRESETS["step3-vl-10b"], PRESETS["smollm2-135m"]
    assert image_budget(text_only, device=CPU) == 0
    budget = image_budget(config, device=CPU)
    assert budget == 5 * 10**7
    page = PAGE_SIZE * 147_456
    assert fit(image_bytes=budget) == (5 * 10**8 - budget) // page
    assert image_budget(config, device=CPU, kv_bytes=9 * 10**8) == 5 * 10**6
    assert image_budget(config, device=CPU, kv_bytes=2 * 10**9) == 0
    with pytest.raises(InputError, match=r"memory may be used, 0\.50 GB of it for images: lower"):
        fit(image_bytes=5 * 10**8)


def test_an_engine_plans_for_images():
    """A budget that is set must reach the executor, and the KV must leave it free."""
    model = Step3VL.from_preset("tiny", seed=1)
    with engine_for(model, max_running=2).executor as executor:
        assert executor.image_bytes == 5 * 10**7
    page = page_bytes(TINY, torch.float32)
    with engine_for(model, max_running=2, image_bytes=5 * 10**8 - 7 * page).executor as executor:
        assert executor.num_pages == 7
    with engine_for(model, kv_tokens=PAGE_SIZE, image_bytes=0).executor as executor:
        assert executor.image_bytes == 0
    with pytest.raises(InputError, match="image_bytes must be at least 0, not -1"):
        engine_for(model, kv_tokens=PAGE_SIZE, image_bytes=-1)


def test_room_for_the_largest_step():
    """A GPU that KV has filled, when a step of many tokens needs more than its usual rest."""
    page = PAGE_SIZE * 147_456
    assert fit(step_bytes=5 * 10**8) == 5 * 10**8 // page
    assert fit(step_bytes=6 * 10**8) == 4 * 10**8 // page
    with pytest.raises(InputError, match=r"of free memory a step takes 1\.00: lower max_running"):
        fit(step_bytes=10**9)
    model = Step3VL.from_preset("tiny", seed=1)
    usual, large = 2048, 100_000
    needed = [prefill_bytes(TINY, rows, rows, torch.float32) for rows in (usual, large)]
    assert needed[0] < 5 * 10**8 < needed[1]
    with pytest.raises(InputError, match=r"a step takes \d\.\d\d, images 0\.05: lower"):
        engine_for(model, max_running=2, token_budget=large)
    replicas = 10**9 // needed[0] + 1  # one more than whose steps fit together
    with pytest.raises(InputError, match="a step takes"):
        engine_for(model, max_running=2, replicas=replicas)


def test_no_more_than_can_be_used():
    """A machine with much memory must not allocate pages that can never be filled."""
    assert fit(max_kv_tokens=PAGE_SIZE * 7) == 7
    assert fit(max_kv_tokens=PAGE_SIZE * 7 + 1) == 8
    assert fit(max_kv_tokens=PAGE_SIZE, min_kv_tokens=PAGE_SIZE * 3) == 3


def test_too_little():
    """The error states the memory needed, the memory free, and the share that may be used."""
    pages = fit(share=1.0)
    assert fit(share=1.0, min_kv_tokens=pages * PAGE_SIZE) == pages
    message = r"KV for 6720 tokens needs 0\.99 GB, but only 50% of 1\.00 GB of free memory may"
    with pytest.raises(InputError, match=message):
        fit(min_kv_tokens=pages * PAGE_SIZE)
    with pytest.raises(InputError, match=r"needs 0\.01 GB"):
        fit(share=0.001)
    for share in (0.0, -1.0, 1.1, float("nan")):
        with pytest.raises(InputError, match="share of memory"):
            fit(share=share)
