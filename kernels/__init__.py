"""The ops of STEP3-VL-10B, each in one file or folder with its definition and faster forms.

An op's definition is `<op>_ref`, in eager PyTorch. Import an op from its module
(`from kernels.prefix_attention import prefix_attention`). This package imports nothing and keeps
its version below 0.9, because transformers looks for a library of the same name and must not
mistake this package for it.
"""

__version__ = "0.1.0"
