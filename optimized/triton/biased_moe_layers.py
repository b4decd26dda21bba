"""MoE layers whose experts have biases, of the Triton routers and experts; a router's product is torch's, in float32.

Each is the operation of its name in `gaugeblock.reference.torch`, in bfloat16, float16 or float32. Matrices of experts are
[in, out]: the kernels read them by their strides, and nothing is copied. Differentiable once, in hidden_states and all of
`state`; the router takes the lower id of equal scores.
"""

from functools import partial

from gaugeblock.optimized import moe_composition
from gaugeblock.optimized.triton import expert_load, experts, noisy_routers, routers

PARTS = moe_composition.on_one_device(
    topk_softmax=routers.topk_softmax,
    ste_topk=noisy_routers.ste_topk,
    fused_swiglu_oai=experts.fused_swiglu_oai,
    fused_gelu_mlp=experts.fused_gelu_mlp,
    load_fractions=partial(moe_composition.load_fractions, expert_load.expert_load),
)

gpt_oss_moe = partial(moe_composition.gpt_oss_moe, PARTS)
upcycled_gpt2_moe = partial(moe_composition.upcycled_gpt2_moe, PARTS)
