"""`gaugeblock selftest`: how good the suite itself is."""

import argparse
from pathlib import Path

from gaugeblock.conformance.commands.options import add_profile

HELP = "how good the suite itself is: five rates"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_profile(parser.add_argument)
    parser.add_argument("--rate", default="all", choices=("all", "variants"), help="only right variants (default: all)")
    parser.add_argument(
        "--mutants", nargs="?", const="all", metavar="CONTRACT", help="mutants by rule instead, of one contract or of all"
    )
    parser.add_argument("--sample", type=int, metavar="N", help="so many mutants of each contract, always the same")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that judge mutants (default: one for each core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rates, or what came of mutants, there")


def run(options: argparse.Namespace) -> int:
    """Measures the rates."""
    from gaugeblock.conformance.engine.processes import workers

    workers.get_ready("gaugeblock.conformance.gate")
    if options.mutants:
        from gaugeblock.conformance.selftest.mutants.command import run_mutants

        return run_mutants(options)
    from gaugeblock.conformance.selftest.command import run_selftest

    return run_selftest(options)
