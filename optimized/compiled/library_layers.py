"""What the models here are composed of: torch's own fused operations, and blocks of them that are compiled or left as they are.

Uncompiled, as on a CPU, where compiling takes minutes, a LayerNorm, its modulation and a gated sum are one operation each, which
reads and writes memory once; what it returns is rounded to the dtype of its inputs. torch.compile fuses them with each other.

Shapes: as in `reference.torch.layers`.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn import functional

Block = Callable[..., Any]
Fuse = Callable[[Block], Block]


@cache
def compiled(block: Block) -> Block:
    """Return a block compiled when it is first needed (importing torch.compile's compiler takes a second), once for all sizes."""
    return torch.compile(block, dynamic=True)


def layer_norm_modulate(hidden_BSD: torch.Tensor, shift_BD: torch.Tensor, scale_BD: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Normalize each token, then scale and shift it as its example asks: [B, S, D]."""
    normalized_BSD = functional.layer_norm(hidden_BSD, hidden_BSD.shape[-1:], eps=eps)
    return torch.addcmul(shift_BD[:, None], normalized_BSD, 1 + scale_BD[:, None])


def gated_residual(residual_BSD: torch.Tensor, branch_BSD: torch.Tensor, gate_BD: torch.Tensor) -> torch.Tensor:
    """Add a branch's result to the residual stream, as far as its example's gate is open: [B, S, D]."""
    return torch.addcmul(residual_BSD, branch_BSD, gate_BD[:, None])


def gated_residual_layer_norm_modulate(
    residual_BSD: torch.Tensor,
    branch_BSD: torch.Tensor,
    gate_BD: torch.Tensor,
    shift_BD: torch.Tensor,
    scale_BD: torch.Tensor,
    *,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """End one branch of a block and begin the next: `gated_residual`, and `layer_norm_modulate` of its result."""
    hidden_BSD = gated_residual(residual_BSD, branch_BSD, gate_BD)
    return hidden_BSD, layer_norm_modulate(hidden_BSD, shift_BD, scale_BD, eps=eps)
