"""AutoencoderKL with its norms in kernels: GroupNorm and silu are one, which reads images with the channels last.

Each is the operation of its name in `gaugeblock.reference.torch`, in bfloat16, float16 or float32. Differentiable once, by images
or latents, and state.
"""

from functools import partial

from gaugeblock.optimized import vae_composition
from gaugeblock.optimized.triton.model_parts import PARTS

encode = partial(vae_composition.encode, PARTS)
decode = partial(vae_composition.decode, PARTS)
