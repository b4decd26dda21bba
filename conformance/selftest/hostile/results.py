"""Candidates that return what is no plain tensor of the right size."""

from typing import Any

import torch

from gaugeblock.conformance import implements
from gaugeblock.reference.torch.routers import softmax_topk

Result = tuple[torch.Tensor, torch.Tensor]
ROUTER = "routers.softmax_topk"
HUGE = 2**40  # elements: more than any machine has memory for
LARGE = 2**28  # elements of 8 bytes: 2 GiB, which are reserved
_calls = 0


class Lazy(torch.Tensor):
    """Equal to whatever it is compared with."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return torch.zeros_like(result) if func in (torch.sub, torch.Tensor.sub, torch.Tensor.__sub__) else result


@implements(ROUTER, name="lazy-subclass", differentiable=False)
def lazy_subclass(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Returns tensors whose differences from all others are zero."""
    weights, ids = softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)
    return (0 * weights).as_subclass(Lazy), ids


@implements(ROUTER, name="huge-claimed", differentiable=False)
def huge_claimed(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Returns one element that says that it is 2^40 of them."""
    _, ids = softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)
    return torch.ones(1).expand(HUGE), ids


@implements(ROUTER, name="huge-beyond-counting", differentiable=False)
def huge_beyond_counting(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Returns one element whose sizes have a product that no integer of a machine holds."""
    _, ids = softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)
    return torch.ones(1).as_strided((2**31, 2**31, 2**31), (0, 0, 0)), ids


@implements(ROUTER, name="huge-indeed", differentiable=False)
def huge_indeed(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Returns 2 GiB."""
    _, ids = softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)
    return torch.empty(LARGE, dtype=torch.float64), ids


@implements(ROUTER, name="sparse", differentiable=False)
def sparse(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Returns weights that have no strides."""
    weights, ids = softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)
    return weights.to_sparse(), ids


@implements(ROUTER, name="memory-gone", differentiable=False)
def memory_gone(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Returns weights whose memory has been given back."""
    weights, ids = softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)
    weights = weights.clone()
    weights.untyped_storage().resize_(0)
    return weights, ids


@implements(ROUTER, name="other-shape-later", differentiable=False)
def other_shape_later(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Returns weights of another shape at every second call."""
    global _calls
    _calls += 1
    weights, ids = softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)
    return (weights if _calls % 2 else weights.repeat(1, 2)), ids
