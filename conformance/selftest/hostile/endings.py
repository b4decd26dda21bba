"""Candidates whose process does not live to answer, or that raise what nobody raises."""

import ctypes
import os
import signal
import sys
from typing import NoReturn

import torch

from gaugeblock.conformance import implements

ROUTER = "routers.softmax_topk"


@implements(ROUTER, name="os-exit")
def os_exit(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> NoReturn:
    """Ends its process as if all were well."""
    os._exit(0)


@implements(ROUTER, name="sys-exit")
def sys_exit(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> NoReturn:
    """The same in the way of Python."""
    sys.exit(0)


@implements(ROUTER, name="segmentation-fault")
def segmentation_fault(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> int:
    """Reads from address 0."""
    return ctypes.string_at(0)[0]


@implements(ROUTER, name="killed")
def killed(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> None:
    """Is killed, as by a machine that has no memory left."""
    os.kill(os.getpid(), signal.SIGKILL)


@implements(ROUTER, name="stopped")
def stopped(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> None:
    """Halts, and does not even handle signals."""
    os.kill(os.getpid(), signal.SIGSTOP)


@implements(ROUTER, name="keyboard-interrupt")
def keyboard_interrupt(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> NoReturn:
    """Pretends that the user has had enough."""
    raise KeyboardInterrupt


@implements(ROUTER, name="memory-taken", memory_gib=1.0)
def memory_taken(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> NoReturn:
    """Takes memory until there is no more."""
    taken = []
    while True:
        taken.append(torch.empty(2**26, dtype=torch.uint8))  # reserved, never touched


class Malicious(Exception):
    """An error that harms whoever looks at it."""

    def __str__(self) -> str:
        raise SystemExit(0)


@implements(ROUTER, name="malicious-error")
def malicious_error(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> NoReturn:
    """Raises an error whose message cannot be had."""
    raise Malicious


@implements(ROUTER, name="endless-error")
def endless_error(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> NoReturn:
    """Raises an error with a message of 16 MB."""
    raise ValueError("router_logits " * 2**20)
