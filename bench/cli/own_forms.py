"""`--with FILE:FUNCTION`: a user's function as a form of an op, in the tables of one run.

The function takes the op's arguments by name and returns what the op does. One with a single
parameter called `inputs` gets the arguments as a dict and returns the call to time: what it does
before is not timed.
"""

import argparse
import inspect
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from bench.peers.peer import Prepare
from bench.suite.forms import add_form
from kernels.errors import one_line
from model.errors import InputError


def add_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--with",
        nargs="+",
        default=(),
        dest="own_forms",
        metavar="FILE:FUNCTION",
        help="also your own function, such as mykernel.py:attend; it takes the arguments of the"
        " one op that --op names",
    )


def add(options: argparse.Namespace) -> None:
    """Add the functions that `--with` names to the op table, and to `--impl` if that names none of
    them.

    Raises InputError for a file that cannot be imported, a function that it lacks, the name of a
    built-in form, or unless `--op` names one op.
    """
    if options.own_forms and len(options.op) != 1:
        raise InputError("--with needs --op and one op: whose arguments does the function take?")
    names = []
    for text in options.own_forms:
        name, function = load(text)
        add_form(options.op[0], name, _prepare(function), text)
        names.append(name)
    if options.impl and not set(names) & set(options.impl):
        options.impl = (*options.impl, *names)


def load(text: str) -> tuple[str, Callable]:
    """The name and the function of a text such as "mykernel.py:attend"."""
    path, colon, name = text.rpartition(":")
    file = Path(path)
    if not colon or not name.isidentifier():
        raise InputError(f"--with {text}: say FILE:FUNCTION, such as mykernel.py:attend")
    if not file.is_file():
        raise InputError(f"--with {text}: there is no file {path}")
    unique = f"own_form_{abs(hash(file.resolve()))}_{file.stem}"  # not a package's name
    spec = spec_from_file_location(unique, file)
    if spec is None or spec.loader is None:
        raise InputError(f"--with {text}: {path} is no Python file (.py)")
    module = module_from_spec(spec)
    sys.path.append(str(file.resolve().parent))  # it may import its neighbours
    sys.modules[unique] = module  # Triton and pickle look functions up in their module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"--with {text}: importing {path} failed: {one_line(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        has = ", ".join(known) or "none"
        raise InputError(f"--with {text}: {path} has no function {name}; it has {has}")
    return name, function


def _prepare(function: Callable) -> Prepare:
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # of a builtin or an extension
        parameters = []
    if parameters == ["inputs"]:
        return function
    return lambda inputs: partial(function, **inputs)
