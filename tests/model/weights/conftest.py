"""The fixture `read`: a config.json with any content, read."""

import json

import pytest

from model.weights.hf_config import read_config


@pytest.fixture
def read(tmp_path):
    """A function that reads a config.json with the given content, text or object."""

    def read_content(content, name="model"):
        (tmp_path / name).mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name / "config.json").write_text(text)
        return read_config(tmp_path / name)

    return read_content
