"""Candidates that never answer."""

import faulthandler
import re
import signal
import sys
from typing import NoReturn

import torch

from gaugeblock.conformance import implements

ROUTER = "routers.softmax_topk"


@implements(ROUTER, name="endless-loop")
def endless_loop(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> NoReturn:
    """Waits for nothing."""
    while True:
        pass


@implements(ROUTER, name="holds-the-lock")
def holds_the_lock(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> bool:
    """Is for hours in a function that lets no other thread run, and looks at no signal."""
    return bool(re.fullmatch("(a+)+", "a" * 64 + "b"))


@implements(ROUTER, name="signals-ignored")
def signals_ignored(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> NoReturn:
    """Ignores every signal that can be ignored, tells nobody where it stands, and swallows every exception."""
    faulthandler.disable()
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    while True:
        try:
            sum(range(10**7))
        except BaseException:
            continue


@implements(ROUTER, name="prints-without-end")
def prints_without_end(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> NoReturn:
    """Prints and prints."""
    while True:
        sys.stdout.write("nothing to see here\n" * 4096)
