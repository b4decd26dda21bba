"""What `gaugeblock codegen` launches: every Triton implementation of ours, as its contract says it is called.

The compiler makes another version for each dtype, each `tl.constexpr` (so for each number of experts), for addresses, sizes
and strides that are multiples of 16 or not, and for sizes and strides of 1. The contracts' landmarks (the first, of sizes
with tails, and the first of even ones), each in two layouts, and their published workloads bring them; an implementation whose
kernels may depend on the batch, the even landmark with the most examples too. `SAMPLE` is a part of these that takes a fifth of
the time: each contract's first landmark, laid out badly, in the last dtype, the even one in the first, and so its last workload.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from functools import partial
from operator import itemgetter

import torch
from triton.runtime.jit import JITFunction

from gaugeblock.conformance.engine.budget.oracle import rounded_cotangents
from gaugeblock.conformance.engine.contract import Contract
from gaugeblock.conformance.engine.frameworks import Call, call_torch
from gaugeblock.conformance.engine.implementation import Implementation
from gaugeblock.conformance.engine.inputs.cases import Case, Layout, lay_out, make_inputs, options
from gaugeblock.conformance.engine.registry import builtin_implementations, contracts, load
from gaugeblock.conformance.engine.vocabulary import Parameters
from gaugeblock.optimized.triton import random

LAYOUTS: tuple[Layout, ...] = ("contiguous", "sliced")
MOST_ELEMENTS = 10**7  # of an input: larger workloads have the kernels of smaller ones
FEW = 64  # examples are enough, since no kernel depends on their number, but where an implementation says so

Launch = tuple[str, Callable[[], object]]


def _launch(contract: Contract, implementation: Implementation, case: Case, dtype: str) -> None:
    made = make_inputs(contract, case, dtype)
    inputs = {key: lay_out(tensor, case.layout) for key, tensor in made.items()}
    call_torch(contract, load(implementation), Call(inputs, options(contract, case), rounded_cotangents(contract, case, dtype)))


def _is_even(contract: Contract, sizes: Parameters) -> bool:
    """Whether all rows of the tested dtype are multiples of 16, as tiles for matrix instructions want them."""
    specs = (spec for spec in contract.specs(sizes).values() if spec.dtype == "tested")
    return all(size % 16 == 0 for spec in specs for size in spec.sizes(sizes)[1:])


def _cases(contract: Contract, implementation: Implementation) -> Iterator[tuple[str, Case]]:
    regime = contract.regimes[0].name
    first, *others = contract.landmarks
    even = [each for each in others if _is_even(contract, each)] or others
    chosen = [("first", first), *(("even", each) for each in even[:1])]
    if not implementation.batch_invariant:
        chosen += [("largest", max(even, key=itemgetter(contract.batch)))]
    for name, landmark in chosen:
        for layout in LAYOUTS:
            yield f"{name} landmark, {layout}", Case(**landmark, regime=regime, layout=layout)
    for workload in contract.workloads:
        parameters = {**workload.parameters, contract.batch: FEW}
        if max(math.prod(spec.sizes(parameters)) for spec in contract.specs(parameters).values()) <= MOST_ELEMENTS:
            yield workload.name, Case(**parameters, regime=regime)


def _has_kernels(implementation: Implementation) -> bool:
    """Whether an operation with a state has kernels of its own.

    Layers and models are composed of other contracts' kernels, and look at what those computed, which here is nothing.
    """
    function = load(implementation)
    own = vars(inspect.getmodule(function)) if inspect.isfunction(function) else {}
    return any(isinstance(each, JITFunction) and each.__module__ == function.__module__ for each in own.values())


def _launches(*, sample: bool = False) -> Iterator[Launch]:
    for contract in contracts().values():
        for implementation in builtin_implementations(contract):
            if implementation.kind == "triton" and (contract.state is None or _has_kernels(implementation)):
                dtypes, all_cases = implementation.dtypes, list(_cases(contract, implementation))
                pairs = [(case, dtype) for case in all_cases for dtype in dtypes]
                if sample:
                    badly_laid_out, even = all_cases[len(LAYOUTS) - 1 : len(LAYOUTS) + 1]
                    pairs = [(badly_laid_out, dtypes[-1]), (even, dtypes[0]), (all_cases[-1], dtypes[0])]
                for (name, case), dtype in pairs:
                    yield f"{contract.name} {name}, {dtype}", partial(_launch, contract, implementation, case, dtype)


def _draw(draw: Callable) -> None:
    draw((1000,), seed=2**40, step=1, example=torch.arange(2), purpose=0)


DRAWS: list[Launch] = [("random.bits", partial(_draw, random.bits)), ("random.normal", partial(_draw, random.normal))]
LAUNCHES: list[Launch] = [*_launches(), *DRAWS]
SAMPLE: list[Launch] = [*_launches(sample=True), *DRAWS]
