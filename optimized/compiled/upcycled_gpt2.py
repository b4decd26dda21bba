"""The upcycled GPT-2 of torch's fused operations, in the dtype of its state, around the MoE layer that is scheduled for a CPU.

It is the operation of its name in `gaugeblock.reference.torch`. Which rows an expert gets is known only when it runs, so nothing
is compiled. Differentiable once, by the state.
"""

from functools import partial

from gaugeblock.optimized import upcycled_gpt2_composition
from gaugeblock.optimized.compiled.biased_moe_layers import upcycled_gpt2_moe
from gaugeblock.optimized.compiled.model_parts import LIBRARY

upcycled_gpt2_by_library = partial(upcycled_gpt2_composition.upcycled_gpt2, LIBRARY, upcycled_gpt2_moe)
