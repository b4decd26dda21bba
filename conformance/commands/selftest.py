"""`gaugeblock selftest`: how good the suite itself is."""

import argparse
from pathlib import Path

from gaugeblock.conformance.commands.options import add_profile

HELP = "how good the suite itself is: five rates"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_profile(parser.add_argument)
    parser.add_argument("--rate", default="all", choices=("all", "variants"), help="only right variants (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rates there")


def run(options: argparse.Namespace) -> int:
    """Measures the rates."""
    from gaugeblock.conformance.engine.processes import workers

    workers.get_ready("gaugeblock.conformance.gate")
    from gaugeblock.conformance.selftest.command import run_selftest

    return run_selftest(options)
