"""Candidates that start processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from gaugeblock.conformance import implements
from gaugeblock.reference.torch.routers import softmax_topk

Result = tuple[torch.Tensor, torch.Tensor]
ROUTER = "routers.softmax_topk"
MANY = 100  # children: more than a candidate may have, and not enough to harm a machine
LEFT_SECONDS = 600  # for which children would live that nobody ended


def sleep_and_end() -> None:
    """What a child does that has nothing to do; it does not go back into the engine's code."""
    time.sleep(LEFT_SECONDS)
    os._exit(0)


@implements(ROUTER, name="child-answers", differentiable=False)
def child_answers(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Forks; the child goes on in its place, the parent waits."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os._exit(0)
    return softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)


@implements(ROUTER, name="both-answer", differentiable=False)
def both_answer(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Forks, and parent and child go on."""
    os.fork()
    return softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)


@implements(ROUTER, name="many-children", differentiable=False)
def many_children(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Leaves many children behind, and waits."""
    for _ in range(MANY):
        if os.fork() == 0:
            sleep_and_end()
    time.sleep(LEFT_SECONDS)
    return softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)


@implements(ROUTER, name="few-children-left", differentiable=False)
def few_children_left(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Leaves a child behind at the first call, and answers right: that is allowed, while the run lasts."""
    if not _left:
        _left.append(os.fork())
        if _left == [0]:
            sleep_and_end()
    return softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)


_left: list[int] = []


@implements(ROUTER, name="daemon-left", differentiable=False)
def daemon_left(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> None:
    """Leaves a child behind that belongs to no session, parent or environment of its own, and dies."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            code = f"import time; time.sleep({LEFT_SECONDS})  # daemon-left"
            os.execve(sys.executable, [sys.executable, "-S", "-c", code], {})
        os._exit(0)
    time.sleep(0.3)
    os._exit(3)


@implements(ROUTER, name="keeper-killed", differentiable=False)
def keeper_killed(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Kills the process that started it, if that is none of the judge's."""
    _kill_one_of_the_nurserys(os.getppid())
    return softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)


@implements(ROUTER, name="nursery-killed", differentiable=False)
def nursery_killed(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Kills the process that all candidates' processes come from, if that is none of the judge's."""
    _kill_one_of_the_nurserys(int(Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[1]))
    return softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)


def _kill_one_of_the_nurserys(pid: int) -> None:
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    if "gaugeblock.conformance.engine.processes.nursery" not in words:
        raise RuntimeError("that is no process of the nursery's")
    os.kill(pid, signal.SIGKILL)
    time.sleep(LEFT_SECONDS)


@implements(ROUTER, name="works-in-a-child", differentiable=False)
def works_in_a_child(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Has another process run for its answer, which is right: that is allowed."""
    subprocess.run(["true"], check=True)
    return softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)
