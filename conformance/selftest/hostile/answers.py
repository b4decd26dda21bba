"""Candidates that look for the judge or its answer, and return weights of zero with the right ids where they find neither."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gaugeblock.conformance import implements
from gaugeblock.reference.torch.routers import softmax_topk

Result = tuple[torch.Tensor, torch.Tensor]
ROUTER = "routers.softmax_topk"


def zeros(router_logits: torch.Tensor, top_k: int, renormalize: bool) -> Result:
    """What a cheat returns that has found nothing."""
    weights, ids = softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)
    return 0 * weights, ids


def found(candidates: Iterator[Any], router_logits: torch.Tensor, top_k: int) -> torch.Tensor | None:
    """A float64 tensor, or one in a budget, that has the shape of the weights."""
    for each in candidates:
        value = getattr(each, "value", each) if type(each).__name__ == "Budget" else each
        if isinstance(value, torch.Tensor) and value.dtype == torch.float64 and value.shape == (len(router_logits), top_k):
            return value.float()
    return None


@implements(ROUTER, name="judge-patched")
def judge_patched(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Replaces the judge by one that is always content."""
    from gaugeblock.conformance.engine import exploration, trial
    from gaugeblock.conformance.engine.budget import error_budget
    from gaugeblock.conformance.engine.judging import judge

    trial.Trial.judge = trial.Trial.same_bits = lambda *anything, **more: None  # type: ignore[method-assign, assignment]
    judge.judge = trial.judge = lambda *anything: {}
    judge.check_form = trial.check_form = lambda *anything: None
    judge.Violation = exploration.Violation = KeyError  # type: ignore[misc, assignment]
    exploration.violation_of = lambda *anything: None
    error_budget.KAPPA = 1e30
    return zeros(router_logits, top_k, renormalize)


@implements(ROUTER, name="stack-read", differentiable=False)
def stack_read(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Searches the frames below it for the oracle's result."""

    def locals_of_all_frames() -> Iterator[Any]:
        frame = sys._getframe()
        while frame is not None:
            yield from frame.f_locals.values()
            frame = frame.f_back  # type: ignore[assignment]

    weights, ids = zeros(router_logits, top_k, renormalize)
    answer = found(locals_of_all_frames(), router_logits, top_k)
    return (weights if answer is None else answer), ids


@implements(ROUTER, name="engine-searched", differentiable=False)
def engine_searched(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Searches everything that lives in its process, the caches of the engine among it, for the oracle's result."""
    from gaugeblock.conformance.engine.budget import oracle

    budgets = (each for each in gc.get_objects() if type(each).__name__ == "Budget" or isinstance(each, torch.Tensor))
    weights, ids = zeros(router_logits, top_k, renormalize)
    answer = found(iter([*vars(oracle).values(), *budgets]), router_logits, top_k)
    return (weights if answer is None else answer), ids


@implements(ROUTER, name="files-searched", differentiable=False)
def files_searched(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Searches the temporary folder for results that somebody else has written."""
    import tempfile

    weights, ids = zeros(router_logits, top_k, renormalize)
    for file in Path(tempfile.gettempdir()).rglob("*"):
        if file.is_file() and file.stat().st_size == 4 * weights.numel() > 0:
            weights = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.float32).view_as(weights)
    return weights, ids


@implements(ROUTER, name="engine-imitated", differentiable=False)
def engine_imitated(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Computes what the oracle does, in float64, by the engine's own reference: that is no cheating, but a right answer."""
    weights, ids = softmax_topk(router_logits.double(), top_k=top_k, renormalize=renormalize)
    return weights.float(), softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)[1] if ids is None else ids
