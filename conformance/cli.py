"""The command `gaugeblock`.

Exit status: 0 all conform, 1 something fails, 2 the call or the candidate file is wrong, or the engine failed, 3 nothing tested.
"""

import argparse
import gc
import sys
from collections.abc import Sequence
from typing import NoReturn

import gaugeblock
from gaugeblock.conformance.commands import bench, check, codegen, compare, explain, list, machines, merge, reproduce, selftest
from gaugeblock.conformance.exit_status import WRONG_CALL

COMMANDS = (check, merge, machines, list, explain, reproduce, compare, selftest, codegen, bench)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand; nothing heavy is imported before it is known which."""
    options = parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except ValueError as error:  # RegistrationError among them: the user's call, file or report is at fault
        print(f"gaugeblock: {error}", file=sys.stderr)
        return WRONG_CALL


def parser() -> argparse.ArgumentParser:
    """Of all subcommands, each with what runs it."""
    parser = argparse.ArgumentParser(prog="gaugeblock", description=gaugeblock.__doc__)
    parser.add_argument("--version", action="version", version=f"gaugeblock {gaugeblock.__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        command = subparsers.add_parser(module.__name__.rpartition(".")[2], help=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def command() -> NoReturn:
    """The console's command: `main`, and a quick end."""
    status = main()
    if not sys.modules.keys() & {"jax", "triton"}:  # whose bindings tell of what is left at the end
        gc.freeze()  # or torch's thousands of functions are looked through once more, half a second, before all is thrown away
    sys.exit(status)


if __name__ == "__main__":
    command()
