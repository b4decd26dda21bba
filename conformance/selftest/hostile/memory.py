"""Candidates that do with memory what they must not; each computes the right result first."""

import threading
from typing import Any

import torch

from gaugeblock.conformance import implements
from gaugeblock.reference.torch.routers import softmax_topk

Result = tuple[torch.Tensor, torch.Tensor]
ROUTER = "routers.softmax_topk"
RIGHT_CALLS = 20

_kept: dict[Any, Result] = {}
_left_behind: list[tuple[threading.Event, threading.Thread]] = []
_calls = 0


@implements(ROUTER, name="input-mutated", validates=False)
def input_mutated(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Uses its input as scratch memory once it has the result."""
    result = softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)
    with torch.no_grad():
        router_logits.detach().zero_()
    return result


@implements(ROUTER, name="input-aliased", differentiable=False)
def input_aliased(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Returns weights that lie in the memory of its input."""
    weights, ids = softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)
    flat = router_logits.detach().view(-1)[: weights.numel()]
    return flat.copy_(weights.view(-1)).view_as(weights), ids


@implements(ROUTER, name="stale-result", differentiable=False)
def stale_result(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Computes once for each shape."""
    name = tuple(router_logits.shape), top_k, renormalize
    if name not in _kept:
        _kept[name] = softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)
    return _kept[name]


@implements(ROUTER, name="cached-by-pointer", differentiable=False)
def cached_by_pointer(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Computes once for each address."""
    name = router_logits.data_ptr(), tuple(router_logits.shape), top_k, renormalize
    if name not in _kept:
        _kept[name] = softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)
    return _kept[name]


@implements(ROUTER, name="workspace-returned", differentiable=False)
def workspace_returned(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Returns memory that its next call writes to."""
    weights, ids = softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)
    name = "workspace", tuple(weights.shape)
    if name not in _kept:
        _kept[name] = torch.empty_like(weights), torch.empty_like(ids)
    return _kept[name][0].copy_(weights), _kept[name][1].copy_(ids)


@implements(ROUTER, name="written-later", differentiable=False)
def written_later(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Leaves a thread behind that writes to the result, during a later call."""
    while _left_behind:
        called_again, thread = _left_behind.pop()
        called_again.set()
        thread.join()  # on a busy machine it would be late
    weights, ids = softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)
    called_again = threading.Event()

    def write() -> None:
        called_again.wait()
        weights.zero_()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    _left_behind.append((called_again, thread))
    return weights, ids


@implements(ROUTER, name="right-at-first", differentiable=False)
def right_at_first(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Answers right as long as a short test would look."""
    global _calls
    _calls += 1
    weights, ids = softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)
    return (weights if _calls <= RIGHT_CALLS else torch.zeros_like(weights)), ids
