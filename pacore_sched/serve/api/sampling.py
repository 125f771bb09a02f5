"""From a request to its sampling parameters, within the server's limits."""

import secrets

from model.config import SamplingConfig
from model.errors import InputError
from pacore_sched.engine.stopping import checked_stops
from pacore_sched.sched.request import Sampling
from pacore_sched.serve.api.requests import Generation
from pacore_sched.serve.errors import refused
from pacore_sched.serve.limits import Limits

MIN_TEMPERATURE = 1e-6  # so that scaled logits stay finite


def sampling_of(
    body: Generation,
    default: SamplingConfig,
    limits: Limits,
    *,
    max_tokens: int | None,
    top_logprobs: int = 0,
) -> Sampling:
    """The parameters of a request; the model's where it gives none. A `max_tokens` of None becomes
    0, which the service replaces by what there is room for. Raises ApiError."""
    temperature = default.temperature if body.temperature is None else body.temperature
    if 0 < temperature < MIN_TEMPERATURE:
        raise refused(
            f"temperature must be 0 or at least {MIN_TEMPERATURE:g}, not {temperature:g}",
            "temperature",
        )
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    try:
        stop = checked_stops(stops)
    except InputError as error:
        raise refused(str(error), "stop") from None
    return Sampling(
        max_tokens=max_tokens or 0,
        temperature=temperature,
        top_k=default.top_k if body.top_k is None else max(body.top_k, 0),
        top_p=default.top_p if body.top_p is None else body.top_p,
        stop=stop,
        ignore_eos=body.ignore_eos,
        top_logprobs=top_logprobs,
    )


def seed_of(body: Generation) -> int:
    """The request's seed, or a random one."""
    return secrets.randbits(63) if body.seed is None else body.seed


def check_rollouts(count: int, limits: Limits, param: str) -> None:
    """Raise ApiError if a request asks for too many rollouts at a time."""
    if count > limits.max_rollouts:
        raise refused(f"{param} asks for {count} rollouts; at most {limits.max_rollouts} may run "
                      "for a request at a time", param)  # fmt: skip
