"""`gaugeblock explain`: what a contract demands."""

import argparse

from gaugeblock.conformance.exit_status import CONFORM

HELP = "what a contract demands"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("contract", metavar="CONTRACT")


def run(options: argparse.Namespace) -> int:
    """Prints it."""
    from rich.console import Console

    from gaugeblock.conformance.engine.properties import properties
    from gaugeblock.conformance.engine.registry import find_contract
    from gaugeblock.conformance.report import catalogue

    catalogue.explain(find_contract(options.contract), tuple(properties().values()), Console())
    return CONFORM
