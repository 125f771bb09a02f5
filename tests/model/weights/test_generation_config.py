"""Tests of generation_config.json: end tokens, sampling settings, and what is not followed."""

import json
from dataclasses import asdict, replace

import pytest

from model.config import TINY, SamplingConfig
from model.errors import InputError
from model.weights.hf_config import write_config
from tests.model.weights.config_files import QWEN3, STEP_VL, merged


def test_the_ends_of_all_files_count(read, tmp_path):
    """Guards against rollouts that run past an end which only one of the files names: chat models
    have more in generation_config.json, others fewer; vLLM and transformers differ in whom they
    ask, so all count. In the published forms and in ours."""
    read(QWEN3)
    generation = tmp_path / "model" / "generation_config.json"
    for text, eos in (
        ('{"eos_token_id": [7, 9]}', (7, 9)),
        ('{"eos_token_id": 9}', (7, 9)),
        ('{"temperature": 1.0}', (7,)),
        ('{"eos_token_id": null}', (7,)),
    ):
        generation.write_text(text)
        assert read(QWEN3).tokens.eos == eos
    generation.write_text('{"eos_token_id": 9}')
    assert read(asdict(TINY)).tokens.eos == (*TINY.tokens.eos, 9)
    generation.unlink()
    assert read(STEP_VL | {"eos_token_id": [1, 151645]}).tokens.eos == (151643, 151645, 151679, 1)
    assert read(merged(QWEN3, "eos_token_id", ...)).tokens.eos == ()


@pytest.mark.parametrize(
    ("generation", "words"),
    [
        ({"do_sample": False, "temperature": 0.5}, "not followed: do_sample False; temperature 0"),
        ({"repetition_penalty": 1.05, "min_p": 0.1}, "repetition_penalty 1.05, min_p 0.1"),
        ({"suppress_tokens": [1]}, r"suppress_tokens \[1\]"),
    ],
)
def test_names_what_is_not_followed(generation, words, read, tmp_path):
    """Guards against answers drawn otherwise than the model's authors say, silently."""
    read(QWEN3)
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(generation))
    with pytest.warns(UserWarning, match=words):
        read(QWEN3)


@pytest.mark.filterwarnings("error")
def test_is_silent_about_settings_without_effect(read, tmp_path):
    """Guards against a warning for every published model."""
    read(QWEN3)
    settings = {"do_sample": True, "repetition_penalty": 1.0, "min_p": 0.0, "num_beams": 1}
    settings |= {"max_new_tokens": 2048, "pad_token_id": 0, "stop_strings": None}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    assert read(QWEN3).sampling == SamplingConfig()


@pytest.mark.parametrize(
    ("generation", "sampling"),
    [
        ({"temperature": 0.6, "top_p": 0.95, "top_k": 20}, SamplingConfig(0.6, 0.95, 20)),
        ({"temperature": 0, "top_p": None}, SamplingConfig(0, 0.9, 5)),
        ({"top_k": -1}, SamplingConfig(0.5, 0.9, 0)),
        ({"eos_token_id": 7}, SamplingConfig(0.5, 0.9, 5)),
    ],
)
def test_generation_config_says_how_to_sample(generation, sampling, read, tmp_path):
    """A value that is ignored, or an absent one that overwrites what config.json says; in the
    published form and in ours."""
    config = replace(TINY, sampling=SamplingConfig(0.5, 0.9, 5))
    for content in (write_config(config), asdict(config)):
        read(content)
        (tmp_path / "model" / "generation_config.json").write_text(json.dumps(generation))
        assert read(content).sampling == sampling


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"temperature": "hot"}', "temperature is 'hot'; it must be 0, or from 1e-6 to 1e6"),
        ('{"temperature": -1}', "temperature is -1; it must"),
        ('{"temperature": NaN}', "temperature is nan; it must"),
        ('{"temperature": true}', "temperature is True; it must"),
        ('{"top_p": 0}', "top_p is 0; it must be above 0 and at most 1"),
        ('{"top_p": [1]}', r"top_p is \[1\]; it must"),
        ('{"top_k": 1e400}', "top_k is inf"),
        ('{"eos_token_id": 96}', "eos_token_id is 96; token ids must be integers from 0 to 95"),
        ('{"eos_token_id": "x"}', "eos_token_id is 'x'"),
        ('{"top_k": 2.5}', "top_k is 2.5; it must be an integer, at least 0"),
        ('{"top_k": -2}', "top_k is -2; it must"),
        ("{", "is not valid JSON"),
        ("[]", "must hold a JSON object"),
    ],
)
def test_refuses_a_malformed_generation_config(text, words, read, tmp_path):
    """A traceback when the first token is drawn, or an error that names config.json."""
    read(QWEN3)
    file = tmp_path / "model" / "generation_config.json"
    file.write_text(text)
    with pytest.raises(InputError, match=words) as error:
        read(QWEN3)
    assert str(error.value).startswith(str(file))
