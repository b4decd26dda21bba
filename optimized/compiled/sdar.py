"""SDAR with each layer's attention and its gated network compiled by torch.compile; experts are `moe_layers`'.

One compilation serves all layers, so that its time does not grow with the depth.
Each is the operation of its name in `gaugeblock.reference.torch`.
Differentiable once, by what is floating.
"""

from gaugeblock.optimized import decoder_composition
from gaugeblock.optimized.compiled.decoder_parts import LIBRARY, PARTS
from gaugeblock.optimized.decoder_composition import checked
from gaugeblock.reference import validation

sdar = checked(decoder_composition.sdar, validation.sdar, PARTS)
sdar_moe = checked(decoder_composition.sdar_moe, validation.sdar_moe, PARTS)
sdar_cached = checked(decoder_composition.sdar_cached, validation.sdar_cached, PARTS)
sdar_training = checked(decoder_composition.sdar_training, validation.sdar_training, PARTS)
sdar_by_library = checked(decoder_composition.sdar, validation.sdar, LIBRARY)
sdar_moe_by_library = checked(decoder_composition.sdar_moe, validation.sdar_moe, LIBRARY)
sdar_cached_by_library = checked(decoder_composition.sdar_cached, validation.sdar_cached, LIBRARY)
sdar_training_by_library = checked(decoder_composition.sdar_training, validation.sdar_training, LIBRARY)
