"""MoE layers whose routers weigh what experts are given, of the Triton routers and experts; a router's product is torch's.

Each is the operation of its name in `gaugeblock.reference.torch`, in bfloat16, float16 or float32. Differentiable once, in
hidden_states and all of `state`; of equal logits the router takes the lower id. Experts' matrices are read as they lie.
"""

from functools import partial

from gaugeblock.optimized import moe_composition
from gaugeblock.optimized.triton import experts, routers, shared_experts

PARTS = moe_composition.on_one_device(
    sigmoid_input_scaling=routers.sigmoid_input_scaling,
    fused_swiglu=experts.fused_swiglu,
    shared_swiglu=shared_experts.shared_swiglu,
)

llama4_moe = partial(moe_composition.llama4_moe, PARTS)
