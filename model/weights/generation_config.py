"""generation_config.json: which tokens end a generation, and how to sample."""

import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from model.config import Config, SamplingConfig
from model.errors import InputError, shown
from model.text.files import read_json
from model.weights.config_checks import token_ids, with_settings

FILE = "generation_config.json"

# Settings of transformers that change what is drawn and are not implemented, with the values that
# change nothing; an absent or null key changes nothing either. That leaves out lengths, which
# --max-tokens gives, and what only speeds generation up.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "do_sample": (True,),
    "num_beams": (1,),
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "min_p": (0,),
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "exponential_decay_length_penalty": (),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "stop_strings": ([],),
    "watermarking_config": (),
    "dola_layers": (),
}


def with_generation_config(config: Config, path: Path) -> Config:
    """`config` with what generation_config.json in directory `path` says, if there is one.

    Its end tokens join those of `config`; temperature, top_p and top_k replace them, as in vLLM.
    Warns of settings that are not followed. Raises InputError for an invalid file.
    """
    file = path / FILE
    data = read_json(file)
    if data is None:
        return config
    try:
        eos = token_ids("eos_token_id", data.get("eos_token_id"), config.decoder.vocab_size)
        sampling = _sampling(data, config.sampling)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    ignored = [
        f"{key} {shown(data[key])}"
        for key, neutral in _NEUTRAL.items()
        if data.get(key) is not None and data[key] not in neutral
    ]
    if ignored:
        greedy = "; temperature 0 is greedy" if data.get("do_sample") is False else ""
        text = f"{file}: not followed: {', '.join(ignored)}{greedy}"
        warnings.warn(text, stacklevel=2)
    return replace(config, sampling=sampling).with_ends(eos)


def _sampling(data: dict, default: SamplingConfig) -> SamplingConfig:
    """The settings in `data`; `default` for absent and null keys."""
    names = [field.name for field in fields(SamplingConfig)]
    return with_settings(default, {k: data[k] for k in names if data.get(k) is not None})
