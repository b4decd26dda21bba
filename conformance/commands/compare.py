"""`gaugeblock compare`: two runs of the gate."""

import argparse
from pathlib import Path

HELP = "two runs: new failures, drift of each statistic, any bit that changed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")


def run(options: argparse.Namespace) -> int:
    """Prints what differs."""
    from rich.console import Console

    from gaugeblock.conformance.report.compare import compare, load_run, print_comparison

    comparison = compare(load_run(options.before), load_run(options.after))
    print_comparison(comparison, Console())
    return comparison.exit_status
