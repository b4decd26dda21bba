"""MoE layers whose routers weigh what experts are given, scheduled for a CPU; routers and shared experts are the reference's.

Each is the operation of its name in `gaugeblock.reference.torch`. Differentiable once, in hidden_states and all of `state`.
"""

from functools import partial

from gaugeblock.optimized import moe_composition
from gaugeblock.optimized.compiled import experts
from gaugeblock.optimized.compiled.moe_layers import shared_swiglu
from gaugeblock.reference.torch import routers

PARTS = moe_composition.on_one_device(
    sigmoid_input_scaling=routers.sigmoid_input_scaling, fused_swiglu=experts.fused_swiglu, shared_swiglu=shared_swiglu
)

llama4_moe = partial(moe_composition.llama4_moe, PARTS)
