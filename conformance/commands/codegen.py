"""`gaugeblock codegen`: every Triton kernel compiled for chips that are not there."""

import argparse
from pathlib import Path

HELP = "compile every Triton kernel for four chips, without a GPU"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--target", action="append", default=[], metavar="CHIP", help="only this chip, e.g. sm_90 (repeatable)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every compiled kernel there")


def run(options: argparse.Namespace) -> int:
    """Compiles, and prints a table."""
    from gaugeblock.conformance.codegen.command import main

    arguments = ["--target", *options.target] if options.target else []
    return main(arguments + (["--json", str(options.json)] if options.json else []))
