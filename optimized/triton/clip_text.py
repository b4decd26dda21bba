"""CLIP's text encoder with its norms in kernels.

It is the operation of its name in `gaugeblock.reference.torch`, in bfloat16, float16 or float32. Differentiable once, by the
state.
"""

from functools import partial

from gaugeblock.optimized import clip_text_composition
from gaugeblock.optimized.triton.model_parts import PARTS

clip_text = partial(clip_text_composition.clip_text, PARTS)
