"""Two problems answered by one engine: one after the other, then packed into the same steps.

Run it with `.venv/bin/python examples/pack_two_problems.py [PRESET]`.
PRESET is tiny by default: its weights are random, so its answers are noise. smollm2-135m has real
weights, which `make setup` installs, and takes half a minute on a CPU.
"""

import sys

import torch

from model.step3vl import Step3VL
from pacore_sched.answers.pacore import Pacore, engine_for
from pacore_sched.answers.problem_run import Problem
from pacore_sched.sched.request import Sampling

QUESTIONS = ("What is the capital of France?", "Name three fruits.")
preset = sys.argv[1] if len(sys.argv) > 1 else "tiny"
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
model = Step3VL.from_preset(preset, device=device, dtype=dtype)
print(f"{preset} on {device}" + (" (random weights)" if preset != "smollm2-135m" else ""))

for policy in ("one-at-a-time", "later-round-first"):
    engine = engine_for(model, policy=policy, kv_tokens=8192)
    # For each problem: 4 rollouts in parallel, then one that reads their messages and answers.
    pacore = Pacore(model, engine, widths=[4], sampling=Sampling(max_tokens=32, temperature=0.7))
    problems = [Problem([{"role": "user", "content": q}], id=q) for q in QUESTIONS]
    print(f"\npolicy {policy}")
    for answer in pacore.answers(problems):
        print(f"  {answer.problem} {answer.error or repr(answer.text)}")
    steps, tokens = engine.stats.steps, engine.stats.generated
    print(f"  {steps} steps for {tokens} tokens: {tokens / steps:.1f} tokens per step")
    engine.executor.close()
