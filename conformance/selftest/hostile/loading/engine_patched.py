"""A file that replaces the engine while it is imported, so that everything would pass, and returns weights of zero."""

import torch

from gaugeblock.conformance import implements
from gaugeblock.conformance.engine import exploration, properties, trial
from gaugeblock.conformance.engine.budget import error_budget
from gaugeblock.conformance.engine.judging import judge, verdict
from gaugeblock.reference.torch.routers import softmax_topk

nothing = lambda *anything, **more: None  # noqa: E731
judge.judge = trial.judge = lambda *anything: {}
judge.check_form = trial.check_form = judge.require_within = judge.require_exact = nothing
trial.Trial.judge = trial.Trial.same_bits = nothing  # type: ignore[method-assign]
exploration.violation_of = exploration.check = exploration.pooled_violation = nothing
error_budget.KAPPA = 1e30
verdict.FAILED = frozenset()
properties.properties.cache_clear()


@implements("routers.softmax_topk", name="engine-patched")
def route(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of zero."""
    weights, ids = softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)
    return 0 * weights, ids
