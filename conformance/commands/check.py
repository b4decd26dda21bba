"""`gaugeblock check`: the gate."""

import argparse
from pathlib import Path

from gaugeblock.conformance.commands.options import add_filters, add_profile

HELP = "the gate: judge candidates, or all that is built in"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument(
        "candidates",
        nargs="*",
        metavar="FILE_OR_MODULE",
        help="judge what these register; default: the built-in implementations",
    )
    add_profile(parser.add_argument)
    add_filters(parser.add_argument)
    parser.add_argument("--property", action="append", default=[], metavar="NAME", help="only this property (repeatable)")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write JSON, JUnit XML, Markdown and an HTML page there")
    parser.add_argument(
        "--waivers", type=Path, metavar="FILE", help="TOML file of known failures, each with a link and an expiry date"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")


def run(options: argparse.Namespace) -> int:
    """Judges, prints, writes."""
    from gaugeblock.conformance.engine.processes import nursery, workers

    workers.get_ready("gaugeblock.conformance.gate")  # both import torch while this process does
    nursery.start()
    from gaugeblock.conformance.engine.processes import torchrun
    from gaugeblock.conformance.gate import run_gate

    return torchrun.run(lambda: run_gate(options)) if torchrun.is_torchrun() else run_gate(options)
