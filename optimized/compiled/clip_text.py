"""CLIP's text encoder with its layer compiled by torch.compile.

One compilation serves all layers, so that its time does not grow with the depth; everything between the matrix products and
attention is fused. It is the operation of its name in `gaugeblock.reference.torch`. Differentiable once, by the state.
"""

from functools import partial

from gaugeblock.optimized import clip_text_composition
from gaugeblock.optimized.compiled.model_parts import LIBRARY, PARTS

clip_text = partial(clip_text_composition.clip_text, PARTS)
clip_text_by_library = partial(clip_text_composition.clip_text, LIBRARY)
