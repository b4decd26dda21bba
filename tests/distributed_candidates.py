"""Candidates that run on ranks, for tests/test_ranks.py: a right one, and some that lose a rank."""

import os
import signal
import time

import torch

from gaugeblock.conformance import implements
from gaugeblock.optimized.distributed.experts import fused_swiglu


def on_ranks(name):
    return implements("experts.fused_swiglu", name=name, world_sizes=(1, 2))


@on_ranks("right")
def right(hidden_states, w13, w2, topk_weights, topk_ids, *, mesh):
    return fused_swiglu(hidden_states, w13, w2, topk_weights, topk_ids, mesh=mesh)


@on_ranks("dies")
def dies(*arguments, mesh):
    if mesh.get_local_rank() == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    return right(*arguments, mesh=mesh)


@on_ranks("raises")
def raises(*arguments, mesh):
    if mesh.get_local_rank() == 1:
        raise RuntimeError("no peer access")
    return right(*arguments, mesh=mesh)


@on_ranks("skips")
def skips(hidden_states, *arguments, mesh):
    if mesh.get_local_rank() == 1:
        return torch.zeros_like(hidden_states)
    return right(hidden_states, *arguments, mesh=mesh)


@on_ranks("hangs")
def hangs(*arguments, mesh):
    if mesh.get_local_rank() == 0:
        time.sleep(3600)
    return right(*arguments, mesh=mesh)
