"""Who takes part: every registered implementation, and for some contracts what public libraries offer."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from gaugeblock.conformance.bench.problem import Problem, Results, Unavailable
from gaugeblock.conformance.engine.budget.oracle import gradient_key
from gaugeblock.conformance.engine.calls import apply
from gaugeblock.conformance.engine.contract import Contract
from gaugeblock.conformance.engine.frameworks import call_torch
from gaugeblock.conformance.engine.implementation import Implementation
from gaugeblock.conformance.engine.registry import implementations, load
from gaugeblock.conformance.engine.vocabulary import Framework
from gaugeblock.conformance.peers.competitors import OUTSIDERS, PeerModel


@dataclass(frozen=True)
class Competitor:
    """A row of the table."""

    name: str
    """As the table shows it."""
    prepare: Callable[[Problem], Callable[[], Results]]
    """Returns the call to be timed or counted; raises `Unavailable` if the competitor cannot take part."""
    interpreted: bool = False
    """On a CPU it runs in an interpreter, whose time says nothing."""
    on_ranks: Implementation | None = None
    """If it runs in several processes, of which it is only counted what they send each other."""
    compiles: bool = False
    """It compiles a whole model at every size: of two layers, for a CPU, some ten seconds."""
    function: Callable[[Problem], tuple[Callable[..., Any], Framework]] | None = None
    """Returns what `prepare` calls, and whose arrays it takes; None of what is not called as its contract says."""


@dataclass(frozen=True)
class JaxCall:
    """A call of a JAX function that returns when its work is done."""

    function: Callable[[Results], Results]
    arrays: Results
    is_one_program: bool
    """It can be compiled as a whole; a training step cannot, since it looks at its loss on the host."""
    program: Any = None
    """The whole, compiled before the first call; None where JAX is to compile parts as it meets them."""

    def __call__(self) -> Results:
        """Outputs, and gradients if the problem has them."""
        import jax

        return jax.block_until_ready((self.program or self.function)(self.arrays))

    def compiled(self) -> Any:
        """The program, whose analyses exist on every backend of ours; None where there cannot be one."""
        import jax

        return self.program or (jax.jit(self.function).lower(self.arrays).compile() if self.is_one_program else None)


def competitors(contract: Contract) -> list[Competitor]:
    """All that can be asked to run a contract's workloads."""
    ours = [
        Competitor(
            each.name,
            partial(_registered, each),
            interpreted=each.kind == "triton",
            on_ranks=each if each.world_sizes and each.framework == "torch" else None,
            function=partial(_function, each),
        )
        for each in implementations(contract.name)
    ]
    others = [
        Competitor(name, prepare, compiles=prepare.is_compiled, function=partial(_of_torch, prepare.function))
        if isinstance(prepare, PeerModel)
        else Competitor(name, prepare)
        for name, prepare in OUTSIDERS.get(contract.name, {}).items()
    ]
    return ours + others


def _registered(implementation: Implementation, problem: Problem) -> Callable[[], Results]:
    function, framework = _function(implementation, problem)
    if framework == "jax":
        return _jax_call(problem, function, whole=implementation.kind == "reference")
    return partial(call_torch, problem.contract, function, problem.call)


def _of_torch(function: Callable[[Problem], Callable[..., Any]], problem: Problem) -> tuple[Callable[..., Any], Framework]:
    return function(problem), "torch"


def _function(implementation: Implementation, problem: Problem) -> tuple[Callable[..., Any], Framework]:
    device, dtype = problem.machine.device, problem.machine.dtype
    if implementation.world_sizes:
        raise Unavailable("runs on several ranks, a bench in one process")
    if device not in implementation.devices or dtype not in implementation.dtypes:
        raise Unavailable(f"does not claim {dtype} on {device}")
    if problem.call.cotangents is not None and not implementation.differentiable:
        raise Unavailable("claims no gradients")
    return load(implementation), implementation.framework


def _jax_call(problem: Problem, function: Callable[..., Any], *, whole: bool) -> JaxCall:
    """Outputs, and gradients by `jax.vjp`; `whole` compiles both as one."""
    import jax
    import jax.numpy as jnp

    contract, call = problem.contract, problem.call

    def forward(arrays: Results) -> Results:
        return apply(contract, function, arrays, call.options, jnp.stack)

    def both(arrays: Results) -> Results:
        wanted = {key: arrays[key] for key in contract.differentiable(arrays)}

        def flowing(leaves: Results) -> tuple[Results, Results]:
            outputs = forward(arrays | leaves)
            return {key: outputs[key] for key in cotangents}, outputs

        _, pull_back, outputs = jax.vjp(flowing, wanted, has_aux=True)
        return outputs | {gradient_key(key): each for key, each in pull_back(cotangents)[0].items()}

    arrays = {key: to_jax(tensor) for key, tensor in call.inputs.items()}
    cotangents = {key: to_jax(tensor) for key, tensor in (call.cotangents or {}).items()}
    prepared = JaxCall(both if cotangents else forward, arrays, is_one_program=contract.recurrence is None)
    return replace(prepared, program=prepared.compiled()) if whole else prepared


def to_jax(tensor: torch.Tensor) -> Any:
    """The same values as a jax array; int64 as int32."""
    import jax

    narrow = tensor.to(torch.int32) if tensor.dtype == torch.int64 else tensor.clone()
    return jax.dlpack.from_dlpack(narrow)
