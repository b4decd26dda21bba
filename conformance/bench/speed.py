"""The quick comparison of one's own kernel with the others, before and after a change, by pytest-benchmark.

    pytest --pyargs gaugeblock.conformance.bench.speed --candidate my_kernels.py --benchmark-autosave
    pytest --pyargs gaugeblock.conformance.bench.speed --candidate my_kernels.py --benchmark-compare

The contracts of the candidates are run, with every implementation of them; without candidates all contracts are. `-k decode` or
`--gauge-contract`, `--gauge-implementation` choose. The file's name keeps it out of the gate, which runs `test_*.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import pytest
import torch

from gaugeblock.conformance.bench.competitors import Competitor, competitors
from gaugeblock.conformance.bench.problem import QUICK, Direction, Unavailable, directions, make_problem, scaled
from gaugeblock.conformance.bench.roofline import Machine, this_machine
from gaugeblock.conformance.engine.contract import Contract, Workload
from gaugeblock.conformance.engine.registry import contracts, load_candidates, load_entry_points


@dataclass(frozen=True)
class Contest:
    """One competitor on one workload, in one direction."""

    contract: Contract
    workload: Workload
    direction: Direction
    competitor: Competitor

    @property
    def group(self) -> str:
        """What it shares with those that it is compared with."""
        return f"{self.contract.name}/{self.workload.name}/{self.direction}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each contest that the options leave."""
    if not metafunc.config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("needs pytest-benchmark: pip install 'gaugeblock[benchmarks]'")
    found = list(contests(metafunc.config))
    if not found:
        raise pytest.UsageError("gaugeblock: nothing to measure: no implementation fits the options on this machine")
    metafunc.parametrize("contest", found, ids=[f"{each.group}/{each.competitor.name}" for each in found])


def contests(config: pytest.Config) -> Iterator[Contest]:
    """All that the options leave."""
    load_entry_points()
    own = {each.contract for source in config.getoption("--candidate") for each in load_candidates(source)}
    for contract in contracts().values():
        if (own and contract.name not in own) or not _fits(contract.name, config.getoption("--gauge-contract")):
            continue
        for competitor in competitors(contract):
            if _fits(competitor.name, config.getoption("--gauge-implementation")) and not _is_interpreted(competitor):
                for workload in contract.workloads:
                    for direction in directions(contract):
                        yield Contest(contract, workload, direction, competitor)


def test_speed(contest: Contest, benchmark: Any) -> None:
    """Set-up and a first call, whose results are compared with the reference's, are outside the clock."""
    machine = this_machine(contest.contract.dtypes, quick=True)
    parameters = contest.workload.parameters
    try:
        if machine.device == "cpu":
            parameters, benchmark.extra_info["scale"] = scaled(contest.contract, contest.workload, QUICK, machine.dtype)
        problem = make_problem(contest.contract, parameters, contest.direction, machine)
        call = contest.competitor.prepare(problem)
    except (Unavailable, ImportError) as reason:
        pytest.skip(str(reason))
    deviation = problem.deviation(call(), problem.expected())
    tolerated = torch.finfo(getattr(torch, machine.dtype)).eps ** 0.5
    assert deviation <= tolerated, f"results deviate by {deviation:.1e} from the reference's"
    benchmark.group = contest.group
    benchmark(_waiting(call, machine))
    if benchmark.stats is not None:  # there are none with --benchmark-disable
        benchmark.extra_info["times_over_roofline"] = benchmark.stats.stats.median / machine.seconds(problem.cost)


def _waiting(call: Callable[[], object], machine: Machine) -> Callable[[], object]:
    """On a GPU calls only queue their work; `gaugeblock bench` times it by the GPU's own clock, with a cold cache."""
    if machine.device == "cpu":
        return call

    def waited() -> None:
        call()
        torch.cuda.synchronize()

    return waited


def _is_interpreted(competitor: Competitor) -> bool:
    return competitor.interpreted and not torch.cuda.is_available()


def _fits(name: str, patterns: list[str]) -> bool:
    return not patterns or any(fnmatch(name, pattern) for pattern in patterns)
