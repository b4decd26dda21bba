"""MoE layers of the Triton routers and experts; a router's product is torch's, in float32.

Each is the operation of its name in `gaugeblock.reference.torch`, in bfloat16, float16 or float32. Differentiable once, in
hidden_states and all of `state`; the router takes the lower id of equal scores.
"""

from functools import partial

from gaugeblock.optimized import moe_composition
from gaugeblock.optimized.triton import experts, routers, shared_experts

PARTS = moe_composition.on_one_device(
    softmax_topk=routers.softmax_topk,
    fused_swiglu=experts.fused_swiglu,
    gated_shared_swiglu=shared_experts.gated_shared_swiglu,
)

mixtral_moe = partial(moe_composition.mixtral_moe, PARTS)
qwen3_moe = partial(moe_composition.qwen3_moe, PARTS)
qwen2_moe = partial(moe_composition.qwen2_moe, PARTS)
