"""Activation checkpointing: what is computed within a block is not kept for the backward pass, but computed there once more.

    with blocks_recomputed(True):
        loss = loss_of(model(...))
    gradients = ...          the blocks run again

Source: Chen et al. (arXiv:1604.06174), section 4.1.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial, wraps
from typing import ParamSpec, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_is_asked_for: ContextVar[bool] = ContextVar("is_asked_for", default=False)


@contextmanager
def blocks_recomputed(is_asked_for: bool) -> Iterator[None]:
    """Let blocks that are called within be computed again in the backward pass, where it is asked for."""
    token = _is_asked_for.set(is_asked_for)
    try:
        yield
    finally:
        _is_asked_for.reset(token)


def recomputable(block: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make a function such that `blocks_recomputed` has it computed again."""

    @wraps(block)
    def run(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        # torch.compile traces no context variable, and has means of its own to keep less
        if torch.compiler.is_compiling() or not _is_asked_for.get():
            return block(*arguments, **options)
        return recomputed(block, *arguments, **options)

    return run


def recomputed(block: Callable[Arguments, Result], *arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
    """Return what a block does, and have it computed again in the backward pass."""
    # no reference draws from a generator, whose state would have to be kept
    return checkpoint(partial(block, *arguments, **options), use_reentrant=False, preserve_rng_state=False)
