"""`gaugeblock machines`: the gate on pretended CPUs."""

import argparse
from pathlib import Path

HELP = "the gate on pretended CPUs, whose verdicts must be the same"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--machine", action="append", default=[], metavar="NAME", help="only this one (repeatable)")
    parser.add_argument("--report", type=Path, default=Path("machines"), metavar="DIR", help="a report of each, a page of all")
    parser.add_argument("--variants", action="store_true", help="also judge right variants on each, which none may reject")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- ...", help="arguments of `gaugeblock check`")


def run(options: argparse.Namespace) -> int:
    """Runs the gate on each, and compares."""
    from gaugeblock.conformance.selftest.machines import run_machines

    options.arguments = [each for each in options.arguments if each != "--"]
    return run_machines(options)
