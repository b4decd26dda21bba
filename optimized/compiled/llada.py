"""LLaDA with each layer's attention and its gated network compiled by torch.compile.

One compilation serves all layers, so that its time does not grow with the depth.
It is the operation of its name in `gaugeblock.reference.torch`.
Differentiable once, by what is floating.
"""

from gaugeblock.optimized import decoder_composition
from gaugeblock.optimized.compiled.decoder_parts import LIBRARY, PARTS
from gaugeblock.optimized.decoder_composition import checked
from gaugeblock.reference import validation

llada = checked(decoder_composition.llada, validation.llada, PARTS)
llada_by_library = checked(decoder_composition.llada, validation.llada, LIBRARY)
