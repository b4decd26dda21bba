"""Whether the same call gives the same bits: in how many different ways several runs of one input came out."""

import torch

from gaugeblock.conformance.bench.landmark import results_of
from gaugeblock.conformance.engine.contract import Contract
from gaugeblock.conformance.engine.registry import Implementation
from gaugeblock.conformance.engine.trial import digest

RUNS = 5
THREADS = 2  # at least, since one alone always sums in the same order


def bit_patterns(contract: Contract, implementation: Implementation, dtype: str) -> dict[str, float]:
    """The number of distinct bit patterns of outputs and gradients over `RUNS` runs; 1 is right."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, THREADS))
    try:
        runs = [results_of(contract, implementation, dtype, seed=0) for _ in range(RUNS)]  # kept, so that each lies elsewhere
    finally:
        torch.set_num_threads(threads)
    return {"bit_patterns": float(len({digest(each) for each in runs}))}
