"""Dream with each layer's attention and its gated network compiled by torch.compile.

One compilation serves all layers, so that its time does not grow with the depth.
It is the operation of its name in `gaugeblock.reference.torch`.
Differentiable once, by what is floating.
"""

from functools import partial

from gaugeblock.optimized import decoder_composition
from gaugeblock.optimized.compiled.decoder_parts import LIBRARY, PARTS

dream = partial(decoder_composition.dream, PARTS)
dream_by_library = partial(decoder_composition.dream, LIBRARY)
