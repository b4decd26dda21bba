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
        metavar="FILE_FOLDER_OR_MODULE",
        help="judge what these register; default: the built-in implementations",
    )
    parser.add_argument("--peers", action="store_true", help="judge what public libraries offer, as far as they are installed")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="with --peers: write what came of it into the table there")
    add_profile(parser.add_argument)
    add_filters(parser.add_argument)
    parser.add_argument("--property", action="append", default=[], metavar="NAME", help="only this property (repeatable)")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write JSON, JUnit XML, Markdown and an HTML page there")
    parser.add_argument(
        "--waivers", type=Path, metavar="FILE", help="TOML file of known failures, each with a link and an expiry date"
    )
    parser.add_argument("--verbose", "-v", action="store_true", help="print every matrix, also of contracts where all conforms")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    parser.add_argument("--fresh", action="store_true", help="judge everything, also what is kept")
    parser.add_argument("--kept", metavar="DIR", help="where verdicts are kept, or off (default: $GAUGEBLOCK_KEPT, or a cache)")
    parser.add_argument("--since", metavar="REVISION", help="judge what a change since that git revision can have touched")
    parser.add_argument("--shard", metavar="I/N", help="judge the I-th of N parts, for `gaugeblock merge`")


def run(options: argparse.Namespace) -> int:
    """Judges, prints, writes."""
    _settle_peers(options)
    from gaugeblock.conformance.engine.kept.store import folder_of, holds_something
    from gaugeblock.conformance.engine.processes import nursery, workers

    workers.use_one_thread()
    all_may_be_kept = not options.fresh and holds_something(folder_of(options.kept))
    if not all_may_be_kept:  # it imports torch while this process does
        workers.get_ready("gaugeblock.conformance.gate")
    elif options.candidates:
        nursery.start()
    from gaugeblock.conformance.engine.processes import torchrun
    from gaugeblock.conformance.gate import run_gate

    return torchrun.run(lambda: run_gate(options)) if torchrun.is_torchrun() else run_gate(options)


def _settle_peers(options: argparse.Namespace) -> None:
    """Peers are candidates, of which nothing is kept: a library may be another one tomorrow, under the same version.

    Raises:
        ValueError: Options that do not go together.
    """
    if options.markdown and (options.property or options.dtype or not options.peers):
        raise ValueError("--markdown is for --peers, with all properties and dtypes; any run is written down by --report")
    if not options.peers:
        return
    for name, value in (("candidates", options.candidates), ("--since", options.since), ("--shard", options.shard)):
        if value:
            raise ValueError(f"--peers judges what public libraries offer, all of it here; it cannot be had with {name}")
    from gaugeblock.conformance.peers.trial import SOURCE

    options.candidates, options.kept = [SOURCE], "off"
