"""`python -m bench`: check the numbers of every op, time them, answer a question end to end.

Without a command: `numerics`, `ops`, `decode` and `e2e`, each as a table; `--report DIR` makes an
HTML page and pictures of their rows. A row is a JSON object, on a line of a file with `--out`; it
says what was measured, on what and at which commit, and how far it is from the roofline and from
the exact result. A form whose numbers are wrong gets no time.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import gate, jsonl, listing
from bench.bundles import command as peers
from bench.commands import COMMANDS, TIME_BUDGET_S, filter_arguments
from bench.compare import command as compare
from bench.ops import device_named
from bench.poison import PoisonedError
from bench.report import command as report
from bench.timing import keep_freed_memory
from bench.validate import command as validate
from model.terminal import Parser

NO_MORE = "this process can do no more; `python -m profiles record` gives every case a process"
ALL = ("numerics", "ops", "decode", "e2e")
OTHERS = {
    "validate": (validate, "every op and the tiny model against fp64 and other libraries"),
    "compare": (compare, "two commits, or two files of rows: what has become slower"),
    "gate": (gate, "speed-ups on this CPU against floors"),
    "report": (report, "rows as one HTML page and pictures"),
    "peers": (peers, "which libraries to compare with are here, and how to get them"),
}


def main(argv: Sequence[str] | None, prog: str) -> int:
    """Run the command; 1 if a form's numbers are wrong or it could not run, else 0."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv.insert(0, "all")
    options = _parser(prog).parse_args(argv)
    return options.act(options)


def measure(options: argparse.Namespace) -> int:
    """Run a measuring command, or `ALL` of them: rows as they come to a file, then tables."""
    device = device_named(options.device)
    keep_freed_memory()
    if options.list or options.repro:
        return listing.run(options, device)
    if options.report:
        report.check(options.report)  # now, not after minutes of work
    found: list[dict] = []
    poisoned: PoisonedError | None = None
    for command in ALL if options.command == "all" else (options.command,):
        made = []
        try:
            for row in COMMANDS[command].run(options, device):
                made.append(row)
                if options.out:
                    jsonl.append(options.out, [row])
        except PoisonedError as error:
            poisoned = error
        if made and not options.json:
            COMMANDS[command].display(made)
        found += made
        if poisoned:
            print(f"error: {poisoned.form}: {poisoned}: {NO_MORE}", file=sys.stderr)
            break
    if options.report and found:
        page, *pictures = report.write(found, options.report)
        if not options.json:
            print(f"\nreport: {page} and {len(pictures)} pictures beside it")
    if options.json:
        print(json.dumps({"rows": found}))
    return int(poisoned is not None or any(row.get("failure") for row in found))


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    whole = commands.add_parser("all", help=f"{', '.join(ALL)}: what there is without a command")
    _add_shared(whole)
    nothing = {"op": (), "shape": "", "impl": (), "dtype": (), "model": None, "vision": False}
    sizes = {"batch": (16,), "prefix": (), "suffix": ()}
    whole.set_defaults(grid=True, budget=TIME_BUDGET_S, **nothing, **sizes)
    for name, command in COMMANDS.items():
        of_command = commands.add_parser(name, help=command.help, description=command.help)
        command.arguments(of_command)
        _add_shared(of_command)
    for name, (module, text) in OTHERS.items():
        of_module = commands.add_parser(name, help=text, description=module.__doc__)
        if module is validate:
            filter_arguments(of_module)
            _add_device_and_json(of_module)
        module.add_arguments(of_module)
        of_module.set_defaults(act=module.run)
    return parser


def _add_shared(parser: argparse.ArgumentParser) -> None:
    """What every measuring command takes."""
    _add_device_and_json(parser)
    parser.add_argument("--out", type=Path, metavar="FILE", help="add the rows to a JSONL file")
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="an HTML page and pictures of the rows"
    )
    parser.set_defaults(act=measure, list=False, repro=False)


def _add_device_and_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument(
        "--json", action="store_true", help="no tables; end with one JSON document of all rows"
    )
