"""Decode attention for 16 rollouts that share a prompt: one op call, checked and timed.

Run it with `.venv/bin/python examples/shared_prefix_decode.py`.
"""

import torch

from bench.errors import compare
from bench.measure.timing import measure
from kernels.kv_pages import KVPages
from kernels.plan_node import PlanNode
from kernels.prefix_attention import prefix_attention
from kernels.prefix_plan import PrefixPlan

ROLLOUTS, PREFIX, SUFFIX, PAGE = 16, 2048, 128, 64  # the last three in tokens
HEADS, KV_HEADS, DIM = 32, 8, 128
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32

# The prefix tree in depth-first order. All 16 query rows read the prefix; row r is the last token
# of suffix r, which no other row reads. A node's pages may lie anywhere in the pool.
pool = torch.randperm((PREFIX + ROLLOUTS * SUFFIX) // PAGE).tolist()
nodes = [PlanNode(pool[: PREFIX // PAGE], kv_len=PREFIX, row_start=0, row_end=ROLLOUTS)]
for row in range(ROLLOUTS):
    first = (PREFIX + row * SUFFIX) // PAGE
    nodes.append(PlanNode(pool[first : first + SUFFIX // PAGE], SUFFIX, row, row + 1, num_new=1))
sizes = {"num_rows": ROLLOUTS, "num_pages": len(pool), "page_size": PAGE}
plan = PrefixPlan.build(nodes, **sizes, device=device)
q = torch.randn(ROLLOUTS, HEADS, DIM, device=device, dtype=dtype)
pages = KVPages(*torch.randn(2, len(pool), KV_HEADS, PAGE, DIM, device=device, dtype=dtype))


def attend(impl: str | None) -> torch.Tensor:  # None: "triton" on a GPU, "portable" on a CPU
    return prefix_attention(q, pages, plan, scale=DIM**-0.5, impl=impl)


print(f"{device}, {dtype}: max error {compare(attend(None), attend('eager')).max:.1e}")
times = measure({"eager": lambda _: attend("eager"), "ours": lambda _: attend(None)}, device=device)
eager, ours = (times[name].median_us / 1e3 for name in ("eager", "ours"))
print(f"eager {eager:.2f} ms, ours {ours:.3f} ms, speed-up {eager / ours:.1f}x")
