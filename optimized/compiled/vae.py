"""AutoencoderKL with its blocks compiled by torch.compile: a block of one kind once for all resolutions.

What lies between convolutions (GroupNorm, silu, residual sums) is fused. Each is the operation of its name in
`gaugeblock.reference.torch`. Differentiable once, by images or latents, and state.
"""

from functools import partial

from gaugeblock.optimized import vae_composition
from gaugeblock.optimized.compiled.model_parts import LIBRARY, PARTS

encode = partial(vae_composition.encode, PARTS)
decode = partial(vae_composition.decode, PARTS)
encode_by_library = partial(vae_composition.encode, LIBRARY)
decode_by_library = partial(vae_composition.decode, LIBRARY)
