"""What models are composed of here: the kernels of `norms` and `gated_activations`, beside torch's products."""

from collections.abc import Callable

import torch

from gaugeblock.optimized.model_parts import Parts
from gaugeblock.optimized.triton.gated_activations import geglu
from gaugeblock.optimized.triton.launch import reject_float64
from gaugeblock.optimized.triton.norms import group_norm, group_norm_silu, layer_norm_affine


def as_it_is(block: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a block, which launches its kernels one by one."""
    return block


PARTS = Parts(
    group_norm=group_norm,
    group_norm_silu=group_norm_silu,
    layer_norm_affine=layer_norm_affine,
    geglu=geglu,
    block=as_it_is,
    reject=reject_float64,
)
