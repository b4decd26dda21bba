"""The command `gaugeblock`.

Exit status: 0 all conform, 1 something fails, 2 the call or the candidate file is wrong, or the engine failed, 3 nothing tested.
"""

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import gaugeblock
from gaugeblock.conformance.exit_status import CONFORM, FAILS, WRONG_CALL


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand; nothing heavy is imported before it is known which."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return int(COMMANDS[options.command](options))
    except ValueError as error:  # RegistrationError among them: the user's call, file or report is at fault
        print(f"gaugeblock: {error}", file=sys.stderr)
        return WRONG_CALL


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gaugeblock", description=gaugeblock.__doc__)
    parser.add_argument("--version", action="version", version=f"gaugeblock {gaugeblock.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    check = commands.add_parser("check", help="the gate: judge candidates, or all that is built in")
    check.add_argument(
        "candidates",
        nargs="*",
        metavar="FILE_OR_MODULE",
        help="judge what these register; default: the built-in implementations",
    )
    check.add_argument(
        "--profile", default="quick", choices=("quick", "ci", "thorough"), help="how long it may take (default: quick)"
    )
    check.add_argument("--contract", action="append", default=[], metavar="GLOB", help="only these contracts (repeatable)")
    check.add_argument(
        "--implementation", action="append", default=[], metavar="GLOB", help="only these implementations (repeatable)"
    )
    check.add_argument(
        "--dtype",
        action="append",
        default=[],
        choices=("float32", "float16", "bfloat16"),
        help="only this dtype (repeatable)",
    )
    check.add_argument("--device", action="append", default=[], choices=("cpu", "cuda"), help="only this device (repeatable)")
    check.add_argument("--property", action="append", default=[], metavar="NAME", help="only this property (repeatable)")
    check.add_argument("--report", type=Path, metavar="DIR", help="write JSON, JUnit XML, Markdown and an HTML page there")
    check.add_argument(
        "--waivers", type=Path, metavar="FILE", help="TOML file of known failures, each with a link and an expiry date"
    )
    check.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")

    machines = commands.add_parser("machines", help="the gate on pretended CPUs, whose verdicts must be the same")
    machines.add_argument("--machine", action="append", default=[], metavar="NAME", help="only this one (repeatable)")
    machines.add_argument("--report", type=Path, default=Path("machines"), metavar="DIR", help="a report of each, a page of all")
    machines.add_argument("--variants", action="store_true", help="also judge right variants on each, which none may reject")
    machines.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- ...", help="arguments of `gaugeblock check`")

    listing = commands.add_parser("list", help="contracts and implementations, and what is missing")
    listing.add_argument("--json", action="store_true", help="one JSON object for each contract")
    listing.add_argument("--markdown", action="store_true", help="the table of the README")

    explain = commands.add_parser("explain", help="what a contract demands")
    explain.add_argument("contract", metavar="CONTRACT")

    reproduce = commands.add_parser("reproduce", help="run one failing case again")
    reproduce.add_argument("failure", type=Path, metavar="FAILURE.json")

    compare = commands.add_parser("compare", help="two runs: new failures, drift of each statistic, any bit that changed")
    compare.add_argument("before", type=Path, metavar="A.json")
    compare.add_argument("after", type=Path, metavar="B.json")

    selftest = commands.add_parser("selftest", help="how good the suite itself is: five rates")
    selftest.add_argument("--profile", default="quick", choices=("quick", "ci", "thorough"))
    selftest.add_argument("--rate", default="all", choices=("all", "variants"), help="only right variants (default: all)")
    selftest.add_argument("--json", type=Path, metavar="FILE", help="also write the rates there")

    codegen = commands.add_parser("codegen", help="compile every Triton kernel for four chips, without a GPU")
    codegen.add_argument("--target", action="append", default=[], metavar="CHIP", help="only this chip, e.g. sm_90 (repeatable)")
    codegen.add_argument("--json", type=Path, metavar="FILE", help="also write every compiled kernel there")

    bench = commands.add_parser("bench", help="a roofline table, here and now; or a gate against an earlier revision")
    bench.add_argument(
        "candidates", nargs="*", metavar="FILE_OR_MODULE", help="measure what these register, and its rivals; default: everything"
    )
    bench.add_argument("--contract", action="append", default=[], metavar="NAME", help="only this contract (repeatable)")
    bench.add_argument("--workload", action="append", default=[], metavar="NAME", help="only this workload (repeatable)")
    bench.add_argument("--direction", choices=("forward", "backward", "both"), default="both", help="default: both")
    bench.add_argument(
        "--implementation", action="append", default=[], metavar="GLOB", help="only these implementations (repeatable)"
    )
    bench.add_argument("--quick", action="store_true", help="small sizes, few repeats")
    bench.add_argument("--counters", action="store_true", help="also count what each call allocates, dispatches and launches")
    bench.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    bench.add_argument(
        "--against", metavar="REVISION", help="fail if this working tree is slower, or counts more, than that git revision"
    )
    bench.add_argument("--asv", type=Path, metavar="DIR", help="write results of this machine there as asv would")
    bench.add_argument("--machine", metavar="NAME", help="this machine's name in those results (default: the host's)")
    bench.add_argument("--commit", metavar="HASH", help="the commit that is measured (default: that of the working tree)")
    return parser


def _check(options: argparse.Namespace) -> int:
    from gaugeblock.conformance.engine.processes import nursery, workers

    workers.get_ready("gaugeblock.conformance.gate")  # both import torch while this process does
    nursery.start()
    from gaugeblock.conformance.engine.processes import torchrun
    from gaugeblock.conformance.gate import run_gate

    return torchrun.run(lambda: run_gate(options)) if torchrun.is_torchrun() else run_gate(options)


def _machines(options: argparse.Namespace) -> int:
    from gaugeblock.conformance.selftest.machines import run_machines

    options.arguments = [each for each in options.arguments if each != "--"]
    return run_machines(options)


def _list(options: argparse.Namespace) -> int:
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


def _explain(options: argparse.Namespace) -> int:
    from rich.console import Console

    from gaugeblock.conformance.engine.properties import properties
    from gaugeblock.conformance.engine.registry import find_contract
    from gaugeblock.conformance.report import catalogue

    catalogue.explain(find_contract(options.contract), tuple(properties().values()), Console())
    return CONFORM


def _reproduce(options: argparse.Namespace) -> int:
    from gaugeblock.conformance.engine.reproduction import reproduce_file

    try:
        reproduce_file(options.failure)
    except AssertionError as violation:
        print(f"fails again: {violation}")
        return FAILS
    print("holds now: the failure did not come again")
    return CONFORM


def _compare(options: argparse.Namespace) -> int:
    from rich.console import Console

    from gaugeblock.conformance.report.compare import compare, load_run, print_comparison

    comparison = compare(load_run(options.before), load_run(options.after))
    print_comparison(comparison, Console())
    return comparison.exit_status


def _selftest(options: argparse.Namespace) -> int:
    from gaugeblock.conformance.engine.processes import workers

    workers.get_ready("gaugeblock.conformance.gate")
    from gaugeblock.conformance.selftest.command import run_selftest

    return run_selftest(options)


def _codegen(options: argparse.Namespace) -> int:
    from gaugeblock.conformance.codegen.command import main as codegen

    arguments = ["--target", *options.target] if options.target else []
    return codegen(arguments + (["--json", str(options.json)] if options.json else []))


def _bench(options: argparse.Namespace) -> int:
    from gaugeblock.conformance.bench.command import main as bench

    return bench(options)


COMMANDS = {
    "check": _check, "machines": _machines,
    "list": _list, "explain": _explain, "reproduce": _reproduce, "compare": _compare, "selftest": _selftest,
    "codegen": _codegen, "bench": _bench,
}  # fmt: skip


def command() -> NoReturn:
    """The console's command: `main`, and a quick end."""
    status = main()
    if not sys.modules.keys() & {"jax", "triton"}:  # whose bindings tell of what is left at the end
        gc.freeze()  # or torch's thousands of functions are looked through once more, half a second, before all is thrown away
    sys.exit(status)


if __name__ == "__main__":
    command()
