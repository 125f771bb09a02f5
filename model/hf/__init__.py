"""Our ops inside models of transformers and timm: `patch(model)` replaces the parts it knows, and
`generate(model, ...)` reads a prompt once for all of its continuations.

patch            replaces the `forward` of modules, and restores it
parts            what a family of models tells it
text             what it knows of Qwen3, Llama and the text model of Qwen3-VL
vision           what the vision towers of both libraries share
step3p7          the vision tower of Step3p7, which is STEP3-VL's
timm_pe          timm's PE vision towers
generate         transformers' `generate` over pages that continuations of a prompt share
paged_cache      the pages as a `Cache` of transformers
paged_attention  attention over them, as transformers calls it
page_tree        which pages a batch of sequences has, and the prefix plan of each step
"""

from model.hf.generate import generate
from model.hf.patch import patch, unpatch

__all__ = ["generate", "patch", "unpatch"]
