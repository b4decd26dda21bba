"""The page of `gaugeblock machines`: a column for each machine."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import gaugeblock
from gaugeblock.conformance.report import view
from gaugeblock.conformance.report.page import templates

if TYPE_CHECKING:
    from gaugeblock.conformance.selftest.machines import Run


def render(runs: Sequence["Run"], different: Sequence[str]) -> str:
    """The page, self-contained."""
    identities = dict.fromkeys(identity for each in runs for identity in each.statuses)
    contracts: dict[str, list[str]] = {}
    for identity in identities:
        contracts.setdefault(identity.partition("/")[0], []).append(identity)
    return (
        templates()
        .get_template("machines.html.jinja")
        .render(
            runs=runs,
            different=different,
            contracts=contracts,
            counts=[Counter(each.statuses.values()) for each in runs],
            view=view,
            version=gaugeblock.__version__,
            status_class=lambda status: status.replace(" ", "-"),
        )
    )
