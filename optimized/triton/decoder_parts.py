"""What language models are composed of here: the kernels of `norms`, `rotary`, `gated_activations` and `moe_layers`."""

from gaugeblock.optimized.decoder_composition import DecoderParts
from gaugeblock.optimized.model_parts import as_it_is
from gaugeblock.optimized.triton.gated_activations import swiglu
from gaugeblock.optimized.triton.launch import reject_float64
from gaugeblock.optimized.triton.moe_layers import qwen3_moe
from gaugeblock.optimized.triton.norms import rms_norm
from gaugeblock.optimized.triton.rotary import qk_norm_rotary, rotate

PARTS = DecoderParts(
    rms_norm=rms_norm,
    rotate=rotate,
    qk_norm_rotary=qk_norm_rotary,
    swiglu=swiglu,
    qwen3_moe=qwen3_moe,
    block=as_it_is,
    layer=as_it_is,
    reject=reject_float64,
)
