"""`python -m pacore_sched COMMAND`: PaCoRe answers, from one question to a simulated cluster.

A command's module, and what that imports, is loaded only if it is the one that is called.
"""

import sys
from importlib import import_module

from model.terminal import Parser, run_command

COMMANDS = {  # name -> its module, which has `configure(parser)` and `run(options) -> int`
    "ask": ("pacore_sched.ask", "answer one question"),
    "batch": ("pacore_sched.batch", "answer the questions of a file"),
    "sample": ("pacore_sched.sample_groups", "several samples for every prompt of a file"),
    "simulate": ("pacore_sched.simulate", "compare policies on a simulated machine"),
}


def main() -> int:
    """Run the command; its exit code."""
    parser = Parser(prog="python -m pacore_sched", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about)
        if name in sys.argv[1:2]:
            loaded = import_module(module)
            command.description = loaded.__doc__.partition(": ")[2]
            loaded.configure(command)
            command.set_defaults(run=loaded.run)
    options = parser.parse_args()
    return options.run(options)


if __name__ == "__main__":
    run_command(main)
