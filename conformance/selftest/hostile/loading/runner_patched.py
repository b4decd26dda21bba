"""A file that replaces what answers the judge, so that an answer is what was said before it, and returns weights of zero."""

import torch

from gaugeblock.conformance import implements
from gaugeblock.conformance.engine.processes import perform
from gaugeblock.reference.torch.routers import softmax_topk

perform._settings = lambda: {}
perform.perform.__globals__["CALLERS"] = {
    "torch": lambda contract, function, call: dict(
        zip(("topk_weights", "topk_ids"), function(*call.inputs.values(), **call.options), strict=True)
    )
}


@implements("routers.softmax_topk", name="runner-patched", differentiable=False)
def route(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of zero."""
    weights, ids = softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)
    return 0 * weights, ids
