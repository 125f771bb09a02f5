"""Every op and the whole tiny model against fp64, transformers and timm: `bench validate`."""
