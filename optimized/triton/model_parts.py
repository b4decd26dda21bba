"""What models are composed of here: the kernels of `norms` and `gated_activations`, beside torch's products."""

import torch

from gaugeblock.optimized.model_parts import Parts, as_it_is
from gaugeblock.optimized.triton.gated_activations import geglu
from gaugeblock.optimized.triton.launch import reject_float64
from gaugeblock.optimized.triton.norms import group_norm, group_norm_silu, layer_norm_affine

PARTS = Parts(
    group_norm=group_norm,
    group_norm_silu=group_norm_silu,
    layer_norm_affine=layer_norm_affine,
    geglu=geglu,
    memory_format=torch.channels_last,
    block=as_it_is,
    reject=reject_float64,
)
