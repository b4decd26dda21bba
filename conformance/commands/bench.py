"""`gaugeblock bench`: how fast."""

import argparse
from pathlib import Path

HELP = "a roofline table, here and now; or a gate against an earlier revision"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument(
        "candidates", nargs="*", metavar="FILE_OR_MODULE", help="measure what these register, and its rivals; default: everything"
    )
    parser.add_argument("--contract", action="append", default=[], metavar="NAME", help="only this contract (repeatable)")
    parser.add_argument("--workload", action="append", default=[], metavar="GLOB", help="only these workloads (repeatable)")
    parser.add_argument("--direction", choices=("forward", "backward", "both"), default="both", help="default: both")
    parser.add_argument(
        "--implementation", action="append", default=[], metavar="GLOB", help="only these implementations (repeatable)"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats")
    parser.add_argument("--counters", action="store_true", help="also count what each call allocates, dispatches and launches")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument(
        "--against", metavar="REVISION", help="fail if this working tree is slower, or counts more, than that git revision"
    )
    parser.add_argument("--seconds", type=float, metavar="S", help="end after S seconds; what is not measured by then says so")
    parser.add_argument("--asv", type=Path, metavar="DIR", help="write what asv keeps of a commit there, as asv would")
    parser.add_argument("--question", action="append", default=[], metavar="NAME", help="of that only this, such as Counters")
    parser.add_argument("--machine", metavar="NAME", help="this machine's name in those results (default: host and processor)")
    parser.add_argument("--history", type=int, metavar="N", help="instead measure the last N commits that changed an operation")
    parser.add_argument("--commit", metavar="HASH", help="the commit that is measured (default: that of the working tree)")


def run(options: argparse.Namespace) -> int:
    """Measures, and prints tables."""
    from gaugeblock.conformance.bench.command import main

    return main(options)
