"""Command-line options of all rooms: what each refuses, in one line."""

import argparse
from importlib import import_module
from pkgutil import resolve_name

import pytest

from model.errors import InputError
from model.terminal import Parser, dispatch

BAD_NUMBERS = ("nan", "inf", "-inf", "1e400", "-1e400", "9" * 30, "9" * 5000, "", "many", "1,000")
COMMANDS = {
    f"{room} {name}": target
    for room in ("model", "pacore_sched", "bench", "profiles")
    for name, (target, _) in import_module(f"{room}.__main__").COMMANDS.items()
}


def options_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """All options, those of subcommands included."""
    options = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            options += [o for sub in action.choices.values() for o in options_of(sub)]
        options.append(action)
    return options


@pytest.mark.parametrize("command", COMMANDS)
def test_numbers(command: str):
    """A NaN in a table, a traceback or minutes of silence for a number out of range: no option is
    a plain int or float, and each refuses what is no number of a sensible size."""
    parser = Parser()
    resolve_name(COMMANDS[command]).add_arguments(parser)
    for option in options_of(parser):
        assert option.type not in (int, float), option.option_strings
        if getattr(option.type, "__module__", None) == "pathlib" or option.type is None:
            continue
        for text in BAD_NUMBERS:
            words = [option.option_strings[-1] + "=" + text]
            with pytest.raises(InputError) as raised:
                parser.parse_args(words)
            message = str(raised.value)
            assert option.option_strings[-1] in message or "required" in message, (text, message)
            assert "\n" not in message and len(message) < 1000


@pytest.mark.parametrize(
    "words",
    [["ask", "caf\udce9"], ["ask", "Hi", "--stop=\udcff"], ["batch", "q", "--out", "\udcff"]],
)
def test_arguments_are_utf8(words: list[str]):
    """A traceback from the tokenizer, or half of a character in a journal, for an argument whose
    bytes are not UTF-8, which Python passes on as surrogates."""
    parser = Parser()
    with pytest.raises(InputError, match="is not UTF-8 text"):
        dispatch(parser, {"ask": ("pacore_sched.cli.ask", ""), "batch": ("x", "")}, words)
