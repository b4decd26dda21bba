"""The upcycled GPT-2 with its norms, routers and experts in kernels.

It is the operation of its name in `gaugeblock.reference.torch`, in bfloat16, float16 or float32. Differentiable once, by the
state.
"""

from functools import partial

from gaugeblock.optimized import upcycled_gpt2_composition
from gaugeblock.optimized.triton.biased_moe_layers import upcycled_gpt2_moe
from gaugeblock.optimized.triton.model_parts import PARTS

upcycled_gpt2 = partial(upcycled_gpt2_composition.upcycled_gpt2, PARTS, upcycled_gpt2_moe)
