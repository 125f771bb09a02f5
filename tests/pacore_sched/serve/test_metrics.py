"""The metrics, their page and the dashboard: the same names everywhere, and numbers that add up."""

import json
import re

from tests.pacore_sched.serve.serving import running, scripted
from tests.support import ROOT

SAMPLE = re.compile(r"^(pacore:\w+)(\{[^}]*\})? (\S+)$", re.M)
HISTOGRAM = re.compile(r"_(bucket|count|sum)$")


def samples(text: str) -> dict[str, float]:
    """The sum of each name's samples over their labels."""
    found: dict[str, float] = {}
    for name, _, value in SAMPLE.findall(text):
        found[name] = found.get(name, 0) + float(value)
    return found


def test_metrics():
    """Numbers that do not add up after three requests; a metric that its page or the dashboard does
    not have, or that only they have."""
    with running(scripted(lambda rollout: "</think>ok")) as server:
        server.chat()
        server.chat(n=2)
        server.chat(pacore={"widths": [4]})
        server.wait_idle()
        values = samples(server.get("/metrics").body.decode())
    tokens = len("</think>ok") + 1
    assert values["pacore:generation_tokens_total"] == (1 + 2 + 5) * tokens
    assert values["pacore:rollouts_total"] == 1 + 2 + 5
    assert values["pacore:rounds_total"] == 1 + 1 + 2
    assert values["pacore:request_success_total"] == 3
    assert values["pacore:rollouts_per_problem_sum"] == 8
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert values[f"pacore:{name}_seconds_count"] == 3
    assert values["pacore:request_time_per_output_token_seconds_count"] == 3
    # Each request gets its tokens in as many steps as a rollout has; PaCoRe's in twice as many.
    assert values["pacore:inter_token_latency_seconds_count"] == 4 * tokens - 3
    assert (
        values["pacore:prefix_cache_queries_total"] > values["pacore:prefix_cache_hits_total"] > 0
    )
    assert values["pacore:num_requests_running"] == values["pacore:kv_cache_usage_perc"] == 0
    assert values["pacore:shared_prefix_bytes_saved_total"] > 0
    exported = {HISTOGRAM.sub("", n) for n in values if not n.endswith("_created")}
    page = (ROOT / "docs" / "server.md").read_text()
    assert set(re.findall(r"^\| `(pacore:\w+)`", page, re.M)) == exported
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = {
        HISTOGRAM.sub("", name) for expr in queries for name in re.findall(r"pacore:\w+", expr)
    }
    assert shown <= exported
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]) >= 12


def test_vllm_names():
    """The names that dashboards for vLLM read, with another prefix."""
    vllm = """num_requests_running num_requests_waiting kv_cache_usage_perc num_preemptions_total
        prefix_cache_queries_total prefix_cache_hits_total prompt_tokens_total
        generation_tokens_total request_success_total time_to_first_token_seconds_bucket
        inter_token_latency_seconds_bucket request_time_per_output_token_seconds_bucket
        e2e_request_latency_seconds_bucket request_queue_time_seconds_bucket"""
    with running(scripted(lambda rollout: "</think>ok")) as server:
        server.chat()
        server.wait_idle()
        values = samples(server.get("/metrics").body.decode())
    assert {f"pacore:{name}" for name in vllm.split()} <= values.keys()
