"""Bodies made from the OpenAPI document, right and wrong ones: never a status of 500 and above."""

from collections import Counter
from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode

from tests.pacore_sched.serve.serving import Running, running, scripted

EXAMPLES = 25  # per path and mode


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    # Little KV: with ignore_eos and without a limit, rollouts go on until it is full.
    with running(scripted(lambda rollout: "hm</think>yes", num_pages=256)) as found:
        yield found
        found.wait_idle()


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_status_of_500(server: Running, mode: GenerationMode):
    """A body, a name or a header that breaks a handler."""
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) == 11
    statuses: Counter[int] = Counter()
    for operation in operations:
        if mode == GenerationMode.NEGATIVE and operation.method != "post":
            continue  # nothing can be wrong without a body

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def check(case: schemathesis.Case) -> None:
            body = case.body
            if isinstance(body, dict) and isinstance(body.get("model"), str):
                case.body = {**body, "model": "scripted"}  # to get beyond the check of the name
            response = case.call()
            statuses[response.status_code] += 1
            assert response.status_code < 500, response.text
            if response.status_code >= 400:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

        check()
    assert statuses[200 if mode == GenerationMode.POSITIVE else 400]
