"""Patch a transformers model in one line, compare its logits and time it in turns with itself.

Run it with `.venv/bin/python examples/patch_a_model.py [MODEL]`: a name or folder that
`AutoModelForCausalLM.from_pretrained` takes; without one, a small Qwen3 with random weights.
"""

import sys
from copy import deepcopy

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from bench.measure.timing import measure
from model.hf import patch

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if sys.argv[1:]:
    stock = AutoModelForCausalLM.from_pretrained(sys.argv[1])
else:
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "head_dim": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000}
    stock = AutoModelForCausalLM.from_config(Qwen3Config(**sizes, **heads))
stock = stock.to(device).eval()
ours = deepcopy(stock)
print(patch(ours))  # how many modules use each op

ids = torch.randint(stock.config.vocab_size, (4, 256), device=device)
with torch.inference_mode():
    expected, logits = stock(ids).logits, ours(ids).logits
error = (logits - expected).abs().max() / expected.square().mean().sqrt()
print(f"logits differ by at most {error:.1e} of their RMS")
times = measure({"stock": lambda _: stock(ids), "ours": lambda _: ours(ids)}, device=device)
stock_ms, ours_ms = (times[name].median_us / 1e3 for name in ("stock", "ours"))
print(f"stock {stock_ms:.2f} ms, ours {ours_ms:.2f} ms, speed-up {stock_ms / ours_ms:.2f}x")
