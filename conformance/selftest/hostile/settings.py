"""Candidates that change their process, or what its machine lends it."""

import atexit
import faulthandler
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import torch

from gaugeblock.conformance import implements
from gaugeblock.reference.torch.routers import softmax_topk

Result = tuple[torch.Tensor, torch.Tensor]
ROUTER = "routers.softmax_topk"
PREFIX = "gaugeblock-"  # of a runner's own temporary folder


@implements(ROUTER, name="default-dtype-changed", differentiable=False)
def default_dtype_changed(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Makes float64 the default."""
    torch.set_default_dtype(torch.float64)
    return softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)


@implements(ROUTER, name="seed-set", differentiable=False)
def seed_set(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Sets the seed of all who draw after it."""
    torch.manual_seed(0)
    return softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)


@implements(ROUTER, name="threads-set", differentiable=False)
def threads_set(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Takes all threads for itself."""
    torch.set_num_threads(7)
    return softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)


@implements(ROUTER, name="folder-and-path-changed", differentiable=False)
def folder_and_path_changed(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Moves to another folder and hides every module; its process is its own, and it is right."""
    os.chdir("/")
    sys.path[:] = ["/nowhere"]
    os.environ.clear()
    return softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)


@implements(ROUTER, name="temporary-folder-deleted", differentiable=False)
def temporary_folder_deleted(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Deletes the temporary folder, which is its own, and is right."""
    folder = Path(os.environ["TMPDIR"])
    if not folder.name.startswith(PREFIX) or Path(tempfile.gettempdir()) != folder or folder.is_symlink():
        raise RuntimeError(f"{folder} is no folder of a candidate's own")
    shutil.rmtree(folder, ignore_errors=True)
    return softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)


@implements(ROUTER, name="timer-set", differentiable=False)
def timer_set(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Leaves a timer behind that raises in the code of the engine."""

    def ring(number: int, frame: object) -> None:
        raise RuntimeError("the timer of a candidate")

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    weights, ids = softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)
    return weights, ids


@implements(ROUTER, name="end-prepared", differentiable=False)
def end_prepared(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Has something to do when its process ends, which takes for ever, silences the fault handler, and is right."""
    faulthandler.disable()
    atexit.register(signal.pause)
    return softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)
