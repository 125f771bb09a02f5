"""The presets whose shapes are measured."""

from model.config import PRESETS, Config

BIG, TINY = PRESETS["step3-vl-10b"], PRESETS["tiny"]
SMOLLM2 = PRESETS["smollm2-135m"]
DECODE_ROWS = (1, 16, 64, 256)
Heads = tuple[int, int, int]  # query heads, KV heads, head_dim
WIDE: Heads = (64, 1, 256)


def heads_of(model: Config) -> Heads:
    """The decoder's heads."""
    return model.decoder.heads, model.decoder.kv_heads, model.decoder.head_dim
