"""The UNets with their layers compiled by torch.compile: a ResNet block, and a transformer block, once for all levels.

What lies between convolutions and matrix products (GroupNorm, silu, LayerNorm, GEGLU, residual sums) is fused. Each is the
operation of its name in `gaugeblock.reference.torch`. Differentiable once, by latents, texts and state.
"""

from functools import partial

from gaugeblock.optimized import unet_composition
from gaugeblock.optimized.compiled.model_parts import LIBRARY, PARTS

unet = partial(unet_composition.unet, PARTS)
unet_text_time = partial(unet_composition.unet_text_time, PARTS)
unet_by_library = partial(unet_composition.unet, LIBRARY)
unet_text_time_by_library = partial(unet_composition.unet_text_time, LIBRARY)
