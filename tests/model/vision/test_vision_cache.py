"""Tests of the image cache: lookup by digest, the budget, and no wrong hits."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.runtime.lru import Lru
from model.step3vl import Step3VL
from model.vision.cache import ImageCache
from model.vision.image import Views
from tests.support.errors import max_error


def photo(seed: int, crops: int = 2) -> Views:
    generator = torch.Generator().manual_seed(seed)
    shapes = (56, 56, 3), (crops, 28, 28, 3)
    image, cut = (
        torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for shape in shapes
    )
    return Views(image, cut, newlines=(False,) * crops, digest=bytes([seed]))


@pytest.fixture
def model() -> Step3VL:
    return Step3VL.from_preset("tiny", seed=1)


@pytest.fixture
def encoded(model: Step3VL, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of views that each run of the tower got."""
    counts, patches = [], model.vision.patches

    def spy(views: list[Tensor]) -> Tensor:
        counts.append(len(views))
        return patches(views)

    monkeypatch.setattr(model.vision, "patches", spy)
    return counts


def test_an_image_is_encoded_once(model: Step3VL, encoded: list[int]):
    """Guards against encoding an image twice, in one call or in two, and against other bits than
    without a cache."""
    a, b = photo(1), photo(2)
    alone = model.encode_images([a])
    assert encoded == [3]
    assert torch.equal(model.encode_images([photo(1)]), alone)
    assert encoded == [3]
    together = model.encode_images([b, a, b, a])
    assert encoded == [3, 3]
    features = together.chunk(4)
    assert torch.equal(features[0], features[2])
    assert torch.equal(features[1], alone) and torch.equal(features[3], alone)
    assert torch.equal(model.encode_images([b]), features[0])
    model.vision.cache.budget = 0
    assert torch.equal(model.encode_images([a]), alone)
    assert torch.equal(model.encode_images([b]), features[0])
    assert max_error(model.encode_images([b, a, b]), together[: 3 * len(alone)]) < 1e-5
    assert encoded == [3, 3, 3, 3, 9]


def test_callers_cannot_change_the_cache(model: Step3VL):
    """Guards against a caller that writes into its features and thereby into the cache."""
    with torch.inference_mode():
        expected = model.encode_images([photo(1)]).clone()
        model.vision.cache.clear()
        for _ in range(2):  # new, then cached
            model.encode_images([photo(1)]).zero_()
        assert expected.any() and torch.equal(model.encode_images([photo(1)]), expected)


def test_another_impl_encodes_again(model: Step3VL, encoded: list[int]):
    """Guards comparisons of two impls, which would otherwise compare one with itself."""
    model.encode_images([photo(1)])
    model.set_impl("eager")
    model.encode_images([photo(1)])
    assert encoded == [3, 3]


def test_the_budget_holds_whole_images(model: Step3VL, encoded: list[int]):
    """Guards the eviction of the least recently used image: two of three fit."""
    cache, size = model.vision.cache, model.encode_images([photo(1)]).nbytes
    cache.budget = 2 * size
    for seed in (2, 1, 3):  # 1 is used again, so 2 is evicted
        model.encode_images([photo(seed)])
    assert (len(cache), cache.size, encoded) == (2, 2 * size, [3, 3, 3])
    model.encode_images([photo(1), photo(3)])
    assert encoded == [3, 3, 3]
    model.encode_images([photo(2)])
    assert encoded == [3, 3, 3, 3]
    cache.budget = size  # takes effect at once
    assert (len(cache), cache.size) == (1, size)
    model.encode_images([photo(2)])
    assert encoded == [3, 3, 3, 3]
    model.vision.prepare()
    assert (len(cache), cache.size) == (0, 0)


def test_new_and_known_images_in_order(model: Step3VL, encoded: list[int]):
    """Guards the order of embeddings, for any mixture of new and cached images in a call."""
    a, b, c = photo(1), photo(2, crops=0), photo(3)
    images = [a, b, a, c, b]
    expected = torch.cat([model.encode_images([image]) for image in images])
    for known in ([], [b], [a, c], [a, b, c]):
        model.vision.cache.clear()
        if known:
            model.encode_images(known)
        encoded.clear()
        assert max_error(model.encode_images(images), expected) < 1e-5
        assert sum(encoded) == 7 - sum(len(image.all) for image in known)


def test_images_without_a_digest_are_encoded_always(model: Step3VL, encoded: list[int]):
    """Guards against one image's embeddings for another, where nothing tells them apart."""
    a, b = (replace(photo(seed), digest=b"") for seed in (1, 2))
    first, second = model.encode_images([a]), model.encode_images([b])
    assert encoded == [3, 3] and not torch.equal(first, second)
    together = model.encode_images([a, photo(3), b, a]).chunk(4)
    assert encoded == [3, 3, 12] and len(model.vision.cache) == 1
    for got, want in zip(together, (first, None, second, first), strict=True):
        assert want is None or max_error(got, want) < 1e-5
    model.encode_images([photo(3), a])
    assert encoded == [3, 3, 12, 3]


def test_lru_against_a_list():
    """Guards the budget, the order of use and the sizes, against a list searched from the front."""
    rng, lru, naive = random.Random(0), Lru(10), []
    for step in range(2000):
        key = rng.randrange(8)
        if rng.random() < 0.5:
            match = next((item for item in naive if item[0] == key), None)
            if match:
                naive.remove(match)
                naive.append(match)
            assert lru.get(key) == (match[1] if match else None)
        else:
            size = rng.randrange(1, 13)
            lru.put(key, step, size)
            naive = [item for item in naive if item[0] != key]
            if size <= 10:
                naive.append((key, step, size))
            while sum(item[2] for item in naive) > 10:
                naive.pop(0)
        assert (len(lru), lru.size) == (len(naive), sum(item[2] for item in naive))
    assert ImageCache().budget == 2**30
