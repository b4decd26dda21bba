"""LLaDA with its norms, rotations and gated networks in kernels.

It is the operation of its name in `gaugeblock.reference.torch`, in bfloat16, float16 or float32. Differentiable once, by what is
floating.
"""

from gaugeblock.optimized import decoder_composition
from gaugeblock.optimized.decoder_composition import checked
from gaugeblock.optimized.triton.decoder_parts import PARTS
from gaugeblock.reference import validation

llada = checked(decoder_composition.llada, validation.llada, PARTS)
