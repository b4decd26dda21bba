"""SDAR with its norms, rotations and gated networks, and its experts, in kernels.

Each is the operation of its name in `gaugeblock.reference.torch`, in bfloat16, float16 or float32. Differentiable once, by what
is floating.
"""

from functools import partial

from gaugeblock.optimized import decoder_composition
from gaugeblock.optimized.triton.decoder_parts import PARTS

sdar = partial(decoder_composition.sdar, PARTS)
sdar_moe = partial(decoder_composition.sdar_moe, PARTS)
sdar_cached = partial(decoder_composition.sdar_cached, PARTS)
sdar_training = partial(decoder_composition.sdar_training, PARTS)
