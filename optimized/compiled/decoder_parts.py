"""What language models are composed of here: the references' norms, rotations and activations, which torch.compile fuses, or, on
a CPU, as they are; experts are `moe_layers`'.

There compiling takes minutes.
"""

from dataclasses import replace

from gaugeblock.optimized.compiled import block_attention
from gaugeblock.optimized.compiled.library_layers import compiled
from gaugeblock.optimized.compiled.model_parts import accept
from gaugeblock.optimized.compiled.moe_layers import qwen3_moe
from gaugeblock.optimized.decoder_attention import attention, masks_in_pieces
from gaugeblock.optimized.decoder_composition import DecoderParts
from gaugeblock.optimized.model_parts import as_it_is
from gaugeblock.reference.torch.gated_activations import swiglu
from gaugeblock.reference.torch.norms import rms_norm
from gaugeblock.reference.torch.rotary import qk_norm_rotary, rotate

PARTS = DecoderParts(
    rms_norm=rms_norm,
    rotate=rotate,
    qk_norm_rotary=qk_norm_rotary,
    swiglu=swiglu,
    qwen3_moe=qwen3_moe,
    block=compiled,
    layer=as_it_is,
    masks=block_attention.masks_of_blocks,
    attention=block_attention.attention,
    reject=accept,
)
LIBRARY = replace(PARTS, block=as_it_is, masks=masks_in_pieces, attention=attention)
