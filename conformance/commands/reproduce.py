"""`gaugeblock reproduce`: one failing case again."""

import argparse
from pathlib import Path

from gaugeblock.conformance.exit_status import CONFORM, FAILS

HELP = "run one failing case again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("failure", type=Path, metavar="FAILURE.json")


def run(options: argparse.Namespace) -> int:
    """Says whether it fails again."""
    from gaugeblock.conformance.engine.reproduction import reproduce_file

    try:
        reproduce_file(options.failure)
    except AssertionError as violation:
        print(f"fails again: {violation}")
        return FAILS
    print("holds now: the failure did not come again")
    return CONFORM
