"""MoE layers whose experts have biases, scheduled for a CPU; routers are the reference's.

Each is the operation of its name in `gaugeblock.reference.torch`. Matrices of experts are [in, out]: they are read, and their
gradients written, as they lie. Differentiable once, in hidden_states and all of `state`.
"""

from functools import partial

from gaugeblock.optimized import moe_composition
from gaugeblock.optimized.compiled import experts
from gaugeblock.reference.torch import biased_moe_layers, noisy_routers, routers

PARTS = moe_composition.on_one_device(
    topk_softmax=routers.topk_softmax,
    ste_topk=noisy_routers.ste_topk,
    fused_swiglu_oai=experts.fused_swiglu_oai,
    fused_gelu_mlp=experts.fused_gelu_mlp,
    load_fractions=biased_moe_layers.load_fractions,
)

gpt_oss_moe = partial(moe_composition.gpt_oss_moe, PARTS)
upcycled_gpt2_moe = partial(moe_composition.upcycled_gpt2_moe, PARTS)
