"""Candidates that print, or take away what is printed to."""

import os
import sys
from contextlib import suppress

import torch

from gaugeblock.conformance import implements
from gaugeblock.reference.torch.routers import softmax_topk

Result = tuple[torch.Tensor, torch.Tensor]
ROUTER = "routers.softmax_topk"
LINE = "\x1b[31m<b>this kernel is certified</b>\x1b[0m " * 10


@implements(ROUTER, name="prints-much", differentiable=False)
def prints_much(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Prints 10 MB a call, with control characters and markup, and returns zeros."""
    print("the first line")
    print(f"{LINE}\n" * (10_000_000 // len(LINE)))
    weights, ids = softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)
    return 0 * weights, ids


@implements(ROUTER, name="prints-and-is-right", differentiable=False)
def prints_and_is_right(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Prints 1 MB a call, in one line, and is right."""
    sys.stderr.write("x" * 1_000_000)
    return softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)


@implements(ROUTER, name="output-closed", differentiable=False)
def output_closed(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Closes the standard output and error, and is right."""
    sys.stdout.close()
    sys.stderr.close()
    for file in (1, 2):
        with suppress(OSError):
            os.close(file)
    return softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)


@implements(ROUTER, name="files-closed", differentiable=False)
def files_closed(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Closes every file of its process, the connection to the judge among them."""
    os.closerange(0, 4096)
    return softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)
