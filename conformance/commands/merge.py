"""`gaugeblock merge`: the reports of several shards as one."""

import argparse
from pathlib import Path

HELP = "put the reports of several shards together"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT_DIR", help="what `gaugeblock check --report` wrote")
    parser.add_argument("--report", type=Path, required=True, metavar="DIR", help="write the report of the whole there")


def run(options: argparse.Namespace) -> int:
    """Writes it, and ends as the whole would have."""
    from gaugeblock.conformance.report.merge import run_merge

    return run_merge(options)
