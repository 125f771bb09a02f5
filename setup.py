"""The distribution: its name, packages and requirements. Install it with `make setup`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOMS = ("kernels", "model", "pacore_sched", "bench", "profiles")
VERSION = re.search(r'^__version__ = "(.+)"$', Path("kernels/__init__.py").read_text(), re.M)

setup(
    name="step3vl-pacore",  # never "kernels": transformers looks for a distribution of that name
    version=VERSION[1],
    description="STEP3-VL-10B and PaCoRe at kernel level: fused ops, scheduler, measurements",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    package_dir={"": "."},  # an editable install is then one line in a .pth file
    packages=find_packages(include=[f"{room}{inner}" for room in ROOMS for inner in ("", ".*")]),
    package_data={
        "kernels": ["tuned/*.json"],
        "model": ["text/*.jinja"],
        "pacore_sched": [
            "answers/*.jinja",
            "serve/page/*.html",
            "serve/page/*.css",
            "serve/page/*.js",
        ],
        "bench": ["report/*.jinja"],
        # `simulate` reads its GPU's rates from results/.
        "profiles": ["static/*.jsonl", "results/*/*.jsonl"],
    },
    entry_points={"console_scripts": ["step3vl-pacore = profiles.console:main"]},
    install_requires=[
        "torch>=2.11,<2.16",
        "triton>=3.6,<3.10",
        "numpy>=1.26",
        "safetensors",
        "tokenizers",
        "jinja2>=3.1.6",  # earlier sandboxes have known escapes
        "pillow",
        "rich",
    ],
    extras_require={
        "gguf": ["gguf"],
        "ray": ["ray[serve]>=2.60"],
        "serve": ["fastapi", "uvicorn", "prometheus-client", "pydantic>=2"],
        "test": [
            "pytest",
            "pytest-benchmark",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "openai",
            "schemathesis",
            "transformers>=5.17",  # the first with Step3p7VisionModel
            "gguf",
            "scikit-image",
            "scipy",
            "regex",
            "ruff",
            "mypy",
        ],
        "bench": [
            "aiohttp",
            "gguf",
            "matplotlib",
            "nvtx; sys_platform == 'linux'",
            "pytest-benchmark",
            "scikit-image",
        ],
        "peers": ["flashinfer-python==0.6.13", "liger-kernel==0.8.5", "xformers==0.0.35"],
        # Apart from the others: pip compiles it for up to a quarter of an hour.
        "llama": ["llama-cpp-python>=0.3.36"],
    },
)
