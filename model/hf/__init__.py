"""Our ops inside models of transformers and timm: `patch(model)` replaces the parts it knows.

patch      replaces the `forward` of modules, and restores it
text       what it knows of Qwen3, Llama and the text model of Qwen3-VL
step3p7    of the vision tower of Step3p7, which is STEP3-VL's
timm_pe    of timm's PE vision towers
"""

from model.hf.patch import patch, unpatch

__all__ = ["patch", "unpatch"]
