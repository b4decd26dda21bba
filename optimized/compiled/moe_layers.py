"""MoE layers of the experts that are scheduled for a CPU (`experts.py`); routers and shared experts are the reference's.

Each is the operation of its name in `gaugeblock.reference.torch`. Differentiable once, in hidden_states and all of `state`.
"""

from functools import partial

import torch

from gaugeblock.optimized import moe_composition
from gaugeblock.optimized.compiled import experts
from gaugeblock.reference.torch import experts as reference
from gaugeblock.reference.torch import routers


def gated_shared_swiglu(*inputs: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """As the reference's, in another dtype."""
    return reference.gated_shared_swiglu(*(each.to(out_dtype) for each in inputs))


def shared_swiglu(*inputs: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """As the reference's, in another dtype."""
    return reference.shared_swiglu(*(each.to(out_dtype) for each in inputs))


PARTS = moe_composition.on_one_device(
    softmax_topk=routers.softmax_topk,
    fused_swiglu=experts.fused_swiglu,
    gated_shared_swiglu=gated_shared_swiglu,
)

mixtral_moe = partial(moe_composition.mixtral_moe, PARTS)
qwen3_moe = partial(moe_composition.qwen3_moe, PARTS)
qwen2_moe = partial(moe_composition.qwen2_moe, PARTS)
