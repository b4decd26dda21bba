"""What the models here are composed of: torch's own fused operations, and blocks of them that are compiled or left as they are.

Uncompiled, as on a CPU, where compiling takes minutes, a LayerNorm, its modulation and a gated sum are one operation each, which
reads and writes memory once; what it returns is rounded to the dtype of its inputs. torch.compile fuses them with each other.

Shapes: as in `reference.torch.layers`.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch.nn import functional

from gaugeblock.reference.torch.precision import at_least_float32

State = Mapping[str, torch.Tensor]
Block = Callable[..., Any]
Fuse = Callable[[Block], Block]


@cache
def compiled(block: Block) -> Block:
    """Return a block compiled when it is first needed (importing torch.compile's compiler takes a second), once for all sizes."""
    return torch.compile(block, dynamic=True)


def uncompiled(block: Block) -> Block:
    """Return a block as it is."""
    return block


def linear(state: State, name: str, inputs: torch.Tensor) -> torch.Tensor:
    """Apply the linear layer of that name, with or without a bias, to the last axis."""
    # contiguous, as in reference.torch.layers.linear
    return functional.linear(inputs, state[f"{name}.weight"].contiguous(), state.get(f"{name}.bias"))


def two_linears(state: State, names: tuple[str, str], inputs: torch.Tensor) -> torch.Tensor:
    """Apply two linear layers with a silu between them."""
    return linear(state, names[1], functional.silu(linear(state, names[0], inputs)))


def layer_norm(state: State, name: str, hidden_states: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Apply the LayerNorm of that name to the last axis; in at least float32, rounded once."""
    # on a CPU torch sums the gradients of weight and bias in the dtype of the tokens (2.13): in bfloat16 two digits are left
    wide, weight, bias = map(at_least_float32, (hidden_states, state[f"{name}.weight"], state[f"{name}.bias"]))
    return functional.layer_norm(wide, wide.shape[-1:], weight, bias, eps).to(hidden_states.dtype)


def laid_out(fuse: Fuse, images_BCHW: torch.Tensor) -> torch.Tensor:
    """Return images as blocks that are fused so want them: the channels last where they are compiled, else contiguous.

    With the channels last torch's GroupNorm on a CPU takes E[x**2] - E[x]**2 for the variance (2.13), which is less exact.
    """
    return images_BCHW.contiguous(memory_format=torch.channels_last if fuse is compiled else torch.contiguous_format)


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
