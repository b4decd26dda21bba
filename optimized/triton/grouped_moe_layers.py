"""MoE layers that choose among groups of experts, of the Triton routers and experts; a router's product is torch's, in float32.

Each is the operation of its name in `gaugeblock.reference.torch`, in bfloat16, float16 or float32. Differentiable once, in
hidden_states and all of `state` but the correction bias; of equal scores the router takes the lower id.
"""

from functools import partial

from gaugeblock.optimized import moe_composition
from gaugeblock.optimized.triton import experts, routers, shared_experts

PARTS = moe_composition.on_one_device(
    grouped_softmax_topk=routers.grouped_softmax_topk,
    grouped_sigmoid_topk=routers.grouped_sigmoid_topk,
    fused_swiglu=experts.fused_swiglu,
    shared_swiglu=shared_experts.shared_swiglu,
)

deepseek_v2_moe = partial(moe_composition.deepseek_v2_moe, PARTS)
deepseek_v3_moe = partial(moe_composition.deepseek_v3_moe, PARTS)
