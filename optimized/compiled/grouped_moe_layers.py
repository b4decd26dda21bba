"""MoE layers that choose among groups of experts, scheduled for a CPU; routers and shared experts are the reference's.

Each is the operation of its name in `gaugeblock.reference.torch`. Differentiable once, in hidden_states and all of `state` but
the correction bias.
"""

from functools import partial

from gaugeblock.optimized import moe_composition
from gaugeblock.optimized.compiled import experts
from gaugeblock.optimized.compiled.moe_layers import shared_swiglu
from gaugeblock.reference.torch import routers

PARTS = moe_composition.on_one_device(
    grouped_softmax_topk=routers.grouped_softmax_topk,
    grouped_sigmoid_topk=routers.grouped_sigmoid_topk,
    fused_swiglu=experts.fused_swiglu,
    shared_swiglu=shared_swiglu,
)

deepseek_v2_moe = partial(moe_composition.deepseek_v2_moe, PARTS)
deepseek_v3_moe = partial(moe_composition.deepseek_v3_moe, PARTS)
