"""SDAR with each layer's attention and its gated network compiled by torch.compile; experts are `moe_layers`'.

One compilation serves all layers, so that its time does not grow with the depth.
Each is the operation of its name in `gaugeblock.reference.torch`.
Differentiable once, by what is floating.
"""

from functools import partial

from gaugeblock.optimized import decoder_composition
from gaugeblock.optimized.compiled.decoder_parts import LIBRARY, PARTS

sdar = partial(decoder_composition.sdar, PARTS)
sdar_moe = partial(decoder_composition.sdar_moe, PARTS)
sdar_cached = partial(decoder_composition.sdar_cached, PARTS)
sdar_training = partial(decoder_composition.sdar_training, PARTS)
sdar_by_library = partial(decoder_composition.sdar, LIBRARY)
sdar_moe_by_library = partial(decoder_composition.sdar_moe, LIBRARY)
sdar_cached_by_library = partial(decoder_composition.sdar_cached, LIBRARY)
sdar_training_by_library = partial(decoder_composition.sdar_training, LIBRARY)
