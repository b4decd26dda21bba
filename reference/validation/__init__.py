"""What a call must look like: the checks at the public entrance of every operation, for any array framework.

One function per operation, with the operation's own arguments. Each returns None, or raises

- `TypeError` where an argument is not an array, has the wrong dtype, or is an option that must be an integer;
- `ValueError` where a rank, a size, a device or a value is wrong;

and the message begins with the argument's name. Only `.shape`, `.dtype` and `.device` are read, so a check
starts no kernel; `expert_ids_in_range` and `class_labels_in_range` alone read values.
"""

from gaugeblock.reference.validation.arrays import FLOATING, INTEGER, dtype_name, random_draw, state_entries
from gaugeblock.reference.validation.models import (
    class_labels_in_range,
    dit,
    dit_block,
    gated_residual,
    gated_residual_layer_norm_modulate,
    gelu_mlp,
    layer_norm_modulate,
    patchify,
    position_table,
    self_attention,
    sincos_position_embedding,
    timestep_embedding,
    unpatchify,
)
from gaugeblock.reference.validation.moe import (
    expert_ids_in_range,
    fused_swiglu,
    grouped_sigmoid_topk,
    load_balancing_loss,
    mixtral_moe,
    router_z_loss,
    softmax_topk,
    switch_top1,
)
from gaugeblock.reference.validation.training import (
    euler_sample,
    image_diffusion_batch,
    image_diffusion_state,
    image_diffusion_step,
    rectified_flow,
    rectified_flow_prediction,
    rectified_flow_times,
    velocity_sign,
)

__all__ = [
    "FLOATING",
    "INTEGER",
    "class_labels_in_range",
    "dit",
    "dit_block",
    "dtype_name",
    "euler_sample",
    "expert_ids_in_range",
    "fused_swiglu",
    "gated_residual",
    "gated_residual_layer_norm_modulate",
    "gelu_mlp",
    "grouped_sigmoid_topk",
    "image_diffusion_batch",
    "image_diffusion_state",
    "image_diffusion_step",
    "layer_norm_modulate",
    "load_balancing_loss",
    "mixtral_moe",
    "patchify",
    "position_table",
    "random_draw",
    "rectified_flow",
    "rectified_flow_prediction",
    "rectified_flow_times",
    "router_z_loss",
    "self_attention",
    "sincos_position_embedding",
    "softmax_topk",
    "state_entries",
    "switch_top1",
    "timestep_embedding",
    "unpatchify",
    "velocity_sign",
]
