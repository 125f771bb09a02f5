"""The ops of STEP3-VL-10B, a file or a folder each: an eager PyTorch `<op>_ref` that defines it,
and faster forms of the same op.

Import an op from there (`from kernels.prefix_attention import prefix_attention`). This package
imports nothing and stays below version 0.9: transformers probes for a library of the same name and
must not take this one for it.
"""

__version__ = "0.1.0"
