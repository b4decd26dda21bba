"""`gaugeblock list`: what there is."""

import argparse
import json

from gaugeblock.conformance.exit_status import CONFORM

HELP = "contracts and implementations, and what is missing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--json", action="store_true", help="one JSON object for each contract")
    parser.add_argument("--markdown", action="store_true", help="the table of the README")


def run(options: argparse.Namespace) -> int:
    """Prints a table."""
    from rich.console import Console

    from gaugeblock.conformance.engine.properties import properties
    from gaugeblock.conformance.engine.registry import load_entry_points
    from gaugeblock.conformance.report import catalogue

    load_entry_points()
    if options.json:
        print(json.dumps(catalogue.list_json(tuple(properties())), indent=1))
    elif options.markdown:
        print(catalogue.markdown_table())
    else:
        catalogue.print_catalogue(Console())
    return CONFORM
