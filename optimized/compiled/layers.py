"""The adaptive LayerNorms of `reference.torch.layers`, compiled by torch.compile: residual, gate, norm and modulation fused.

Bound by memory, like the Triton version. One compilation serves all sizes but 0 and 1, which torch.compile treats by
themselves, as it does each dtype, order of strides and set of wanted gradients.
"""

import torch

from gaugeblock.reference import validation
from gaugeblock.reference.torch import layers as reference

# The references check their arguments while they are traced; an error that is raised there would lose its type.
_layer_norm_modulate = torch.compile(reference.layer_norm_modulate, dynamic=True)
_gated_residual_layer_norm_modulate = torch.compile(reference.gated_residual_layer_norm_modulate, dynamic=True)


def layer_norm_modulate(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Normalize each token, then scale and shift it as its example asks: `reference.torch.layers.layer_norm_modulate`.

    Args:
        hidden_states: [batch_size, num_tokens, hidden_size], floating; shift and scale have its dtype.
        shift: [batch_size, hidden_size].
        scale: [batch_size, hidden_size].
        eps: Added to the variance; positive.

    Returns:
        [batch_size, num_tokens, hidden_size], dtype as hidden_states; computed in float32 (float64 for float64 inputs)
        and rounded once.

    Raises:
        TypeError: An argument is not an array of the dtype above, or eps is no number.
        ValueError: Ranks, sizes or devices do not fit together, or eps is not positive.

    Source: `gaugeblock.reference.torch.layers.layer_norm_modulate`.
    """
    validation.layer_norm_modulate(hidden_states, shift, scale, eps)
    return _layer_norm_modulate(hidden_states, shift, scale, eps=eps)


def gated_residual_layer_norm_modulate(
    residual: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    *,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """End one branch of a block and begin the next: `reference.torch.layers.gated_residual_layer_norm_modulate`.

    Args:
        residual: [batch_size, num_tokens, hidden_size], floating; the others have its dtype.
        branch: [batch_size, num_tokens, hidden_size].
        gate: [batch_size, hidden_size].
        shift: [batch_size, hidden_size].
        scale: [batch_size, hidden_size].
        eps: Added to the variance; positive.

    Returns:
        hidden_states, modulated: [batch_size, num_tokens, hidden_size] each, dtype as residual; each is computed in
        float32 (float64 for float64 inputs) and rounded once.

    Raises: as `layer_norm_modulate`.

    Source: `gaugeblock.reference.torch.layers.gated_residual_layer_norm_modulate`.
    """
    validation.gated_residual_layer_norm_modulate(residual, branch, gate, shift, scale, eps)
    return _gated_residual_layer_norm_modulate(residual, branch, gate, shift, scale, eps=eps)
