"""SDAR with its norms, rotations and gated networks, and its experts, in kernels.

Each is the operation of its name in `gaugeblock.reference.torch`, in bfloat16, float16 or float32. Differentiable once, by what
is floating.
"""

from gaugeblock.optimized import decoder_composition
from gaugeblock.optimized.decoder_composition import checked
from gaugeblock.optimized.triton.decoder_parts import PARTS
from gaugeblock.reference import validation

sdar = checked(decoder_composition.sdar, validation.sdar, PARTS)
sdar_moe = checked(decoder_composition.sdar_moe, validation.sdar_moe, PARTS)
sdar_cached = checked(decoder_composition.sdar_cached, validation.sdar_cached, PARTS)
sdar_training = checked(decoder_composition.sdar_training, validation.sdar_training, PARTS)
