"""The UNets with norms and gated activations in kernels: GroupNorm with silu, LayerNorm, and GEGLU are one kernel each.

Norms read images with the channels last, as convolutions leave them, and GEGLU the halves of a product where they lie: nothing is
copied. Each is the operation of its name in `gaugeblock.reference.torch`, in bfloat16, float16 or float32. Differentiable once,
by latents, texts and state.
"""

from functools import partial

from gaugeblock.optimized import unet_composition
from gaugeblock.optimized.triton.model_parts import PARTS

unet = partial(unet_composition.unet, PARTS)
unet_text_time = partial(unet_composition.unet_text_time, PARTS)
