"""`bench validate`: every op and the whole tiny model against fp64, transformers and timm."""
