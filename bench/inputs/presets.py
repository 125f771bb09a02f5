"""The presets whose shapes are measured."""

from model.config import PRESETS, Config, VisionConfig

BIG, TINY = PRESETS["step3-vl-10b"], PRESETS["tiny"]
SMOLLM2 = PRESETS["smollm2-135m"]
DECODE_ROWS = (1, 16, 64, 256)
Heads = tuple[int, int, int]  # query heads, KV heads, head_dim
WIDE: Heads = (64, 1, 256)


def heads_of(model: Config) -> Heads:
    """The decoder's heads."""
    return model.decoder.heads, model.decoder.kv_heads, model.decoder.head_dim


def vision_of(model: Config) -> VisionConfig:
    """The vision tower's config, of a model that has one."""
    assert model.vision is not None, f"{model.name} has no vision tower"
    return model.vision
