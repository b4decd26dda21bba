"""Candidates that speak to the judge themselves."""

import gc
import json
import os
import pickle
import socket
import struct
import sys
from typing import Any

import torch

from gaugeblock.conformance import implements
from gaugeblock.reference.torch.routers import softmax_topk

Result = tuple[torch.Tensor, torch.Tensor]
ROUTER = "routers.softmax_topk"
HEADER = struct.Struct("<QQQ")


def connection() -> socket.socket:
    """The connection to the judge, found among all objects of the process."""
    return next(each for each in gc.get_objects() if isinstance(each, socket.socket) and each.fileno() >= 0)


def send(message: bytes, length: int | None = None, behind: int = 0) -> None:
    """Says something as the engine would."""
    connection().sendall(HEADER.pack(len(message) if length is None else length, behind, 0) + message)


class Harm:
    """Does something where it is unpickled."""

    def __reduce__(self) -> Any:
        return os._exit, (0,)


@implements(ROUTER, name="garbage-sent", differentiable=False)
def garbage_sent(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Sends bytes that mean nothing."""
    connection().sendall(b"\xff" * 4096)
    return softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)


@implements(ROUTER, name="pickle-sent", differentiable=False)
def pickle_sent(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Sends a pickle that would end the process that reads it."""
    send(pickle.dumps(Harm()))
    return softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)


@implements(ROUTER, name="much-announced", differentiable=False)
def much_announced(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Announces a message of 2^60 bytes."""
    send(b"", length=2**60)
    return softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)


@implements(ROUTER, name="deep-answer", differentiable=False)
def deep_answer(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Sends lists in lists in lists."""
    send(b"[" * 2**20)
    return softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)


def describe(**changes: Any) -> dict[str, Any]:
    """An answer as the engine gives it, with changes to what is said of the weights."""
    weights = {"dtype": "float32", "shape": [1, 1], "start": 0} | changes
    ids = {"dtype": "int64", "shape": [1, 1], "start": 0}
    findings: dict[str, Any] = {"launches": {}, "races": [], "unbatched": [], "settings_changed": []}
    return {"results": {"topk_weights": weights, "topk_ids": ids}, "findings": findings, "number": number_of_call()}


def number_of_call() -> int:
    """What the engine calls this call."""
    frame = sys._getframe()
    while "request" not in frame.f_locals and frame.f_back is not None:
        frame = frame.f_back
    return int(frame.f_locals["request"].number)


@implements(ROUTER, name="results-beyond-memory", differentiable=False)
def results_beyond_memory(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Answers that its results lie behind the memory of results."""
    send(json.dumps(describe(start=2**40)).encode())
    return softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)


@implements(ROUTER, name="results-of-no-type", differentiable=False)
def results_of_no_type(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Answers with a type that cannot be read from memory."""
    send(json.dumps(describe(dtype="quint4x2")).encode())
    return softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)


@implements(ROUTER, name="results-only-claimed", differentiable=False)
def results_only_claimed(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Answers with shapes alone, which are the right ones."""
    shape = [len(router_logits), top_k]
    message = describe(shape=shape, start=None)
    message["results"]["topk_ids"] |= {"shape": shape, "start": None}
    send(json.dumps(message).encode())
    return softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)


@implements(ROUTER, name="answered-twice", differentiable=False)
def answered_twice(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Answers before the engine does, so that each answer of the engine's is taken for one to the next call."""
    send(json.dumps({"raised": [["ValueError"], "router_logits top_k", ""], "number": number_of_call()}).encode())
    return softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)


@implements(ROUTER, name="findings-of-no-type", differentiable=False)
def findings_of_no_type(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Answers with findings that are none."""
    send(json.dumps(describe() | {"findings": {"launches": [1], "races": 7}}).encode())
    return softmax_topk(router_logits, top_k=top_k, renormalize=renormalize)


@implements(ROUTER, name="results-overwritten", differentiable=False)
def results_overwritten(router_logits: torch.Tensor, *, top_k: int, renormalize: bool) -> Result:
    """Fills all memory that it shares with the judge, and returns zeros."""
    from gaugeblock.conformance.engine.processes.wire import Arena

    for each in [each for each in gc.get_objects() if isinstance(each, Arena)]:
        each.memory[: 2**20] = b"\x7f" * 2**20
    weights, ids = softmax_topk(router_logits.zero_(), top_k=top_k, renormalize=renormalize)
    return 0 * weights, ids
