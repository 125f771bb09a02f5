"""Where the benchmarks launch kernels: sites for `compile_ahead`, all on CPU tensors."""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import product

import torch

from bench.inputs.presets import BIG
from bench.measure.devices import DTYPES, MAIN_DTYPE
from bench.measure.pairs import CHECKED_DTYPE, checks, pairs
from bench.measure.verdicts import copied
from bench.studies.decode import SIZES, DecodeCase, prepare
from bench.suite import cases, numerics_cases
from bench.suite.forms import form, forms_of
from bench.suite.op import Case
from kernels.compile.worker import Site
from kernels.prefix_attention.check import check_schedule
from kernels.sampling import sample
from model.config import Config
from pacore_sched.engine.launch_sites import engine_sites, one_layer


def all_sites() -> list[Site]:
    """Everything that a GPU run of all benchmarks launches: checks in every dtype, timed work."""
    numerics = case_sites((case, dtype) for dtype in DTYPES for case in numerics_cases())
    checked = (partial(launch_checked, site) for site in (*numerics, *check_sites()))
    return [*numerics, *checked, *timed_sites()]


def timed_sites() -> list[Site]:
    """Everything that is timed on a GPU: the op table, pairs of forms, decode steps, the engine."""
    main = MAIN_DTYPE["cuda"]
    steps = [DecodeCase(*sizes) for sizes in product(*SIZES["cuda"])]
    return [
        *case_sites((case, main) for case in cases("cuda")),
        *pair_sites(main),
        *decode_sites(BIG, steps, main),
        *engine_sites(BIG, main),
        *engine_sites(BIG, main, torch.float8_e4m3fn),
    ]


def case_sites(
    selected: Iterable[tuple[Case, torch.dtype]], impls: Sequence[str] = ()
) -> list[Site]:
    """The Triton forms of the cases, or only those in `impls`."""
    return [
        partial(launch_case, case, name, dtype)
        for case, dtype in selected
        for name in ("triton", *case.modes)
        if not impls or name in forms_of(case, impls)
    ]


def pair_sites(dtype: torch.dtype) -> list[Site]:
    """Both forms of every pair, whichever of them the rule chooses."""
    return [
        partial(launch_case, case, name, dtype) for case, names in pairs("cuda") for name in names
    ]


def check_sites() -> list[Site]:
    """Both forms of every check that `first-light` makes before it times pairs."""
    return [
        partial(launch_case, case, name, CHECKED_DTYPE)
        for case, names in checks("cuda")
        for name in names
    ]


def decode_sites(config: Config, cases: Iterable[DecodeCase], dtype: torch.dtype) -> list[Site]:
    """The steps of `bench decode`, with KV pages in `dtype` and in FP8."""
    return [
        partial(launch_decode, config, case, dtype, kv_dtype)
        for case in cases
        for kv_dtype in (dtype, torch.float8_e4m3fn)
    ]


def launch_case(case: Case, name: str, dtype: torch.dtype) -> None:
    """Call a form on a case's inputs, and on copies of them, whose alignment may differ."""
    inputs = case.inputs(0, torch.device("cpu"), dtype)
    form(case.op, name)(inputs)()
    form(case.op, name)(copied(inputs))()


def launch_checked(site: Site) -> None:
    """Run a site with the schedule's debug check compiled in."""
    token = check_schedule.set(True)
    try:
        site()
    finally:
        check_schedule.reset(token)


def launch_decode(
    config: Config, case: DecodeCase, dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    """Run one decode step in the best form of every op."""
    model = one_layer(config, dtype)
    step, cache = prepare(case, model)
    if kv_dtype != dtype:
        cache = model.new_cache(cache.num_pages, kv_dtype)
    ids, decoder = torch.zeros(case.batch, dtype=torch.int64), model.decoder
    logits = decoder.logits(decoder(decoder.embed(ids), step, cache))
    sample(logits, ids, step.positions, temperature=1.0)
