"""The MoE layer of DiT-MoE of the experts that are scheduled for a CPU (`experts.py`); gate, shared expert and loss are the
reference's.

The operation is that of `gaugeblock.reference.torch.dit_moe_layers`. Differentiable once, in hidden_states and all of `state`.
"""

from functools import partial

from gaugeblock.optimized import moe_composition
from gaugeblock.optimized.compiled import experts
from gaugeblock.optimized.compiled.moe_layers import shared_swiglu
from gaugeblock.reference.torch.dit_moe_layers import balance_loss, gate

PARTS = moe_composition.on_one_device(
    dit_moe_gate=gate,
    fused_swiglu=experts.fused_swiglu,
    shared_swiglu=shared_swiglu,
    balance_loss=balance_loss,
)

dit_moe = partial(moe_composition.dit_moe, PARTS)
