"""flash-linear-attention's norms, gate and rotation on trial; imported only where fla-core is installed."""

from fla.modules.activations.ops import swiglu
from fla.modules.norm.layernorm import layer_norm, rms_norm
from fla.modules.rotary.ops import rotary_embedding

from gaugeblock.conformance.engine.vocabulary import DTYPES
from gaugeblock.conformance.peers.peer import peer


@peer("norms.rms_norm", dtypes=DTYPES, right_in=(), kind="triton", rounding="eager")
class FlaRmsNorm:
    """RMSNorm's function, without a bias."""

    def __call__(self, hidden_states, weight, *, eps):
        return rms_norm(hidden_states, weight, None, eps=eps)


@peer("norms.layer_norm_affine", dtypes=DTYPES, right_in=(), kind="triton", rounding="eager")
class FlaLayerNorm:
    """LayerNorm's function."""

    def __call__(self, hidden_states, weight, bias, *, eps):
        return layer_norm(hidden_states, weight, bias, eps=eps)


@peer("rotary.rotate", dtypes=DTYPES, kind="triton", rounding="eager")
class FlaRotary:
    """Of tokens' heads; it takes angles in the heads' dtype alone."""

    def __call__(self, heads, cos, sin, *, pairs):
        by_token = heads.transpose(1, 2)
        interleaved = pairs == "interleaved"
        return rotary_embedding(by_token, cos.to(heads.dtype), sin.to(heads.dtype), interleaved=interleaved).transpose(1, 2)


@peer("gated_activations.swiglu", dtypes=DTYPES, kind="triton", rounding="eager")
class FlaSwiGlu:
    """GatedMLP's function."""

    def __call__(self, gate, up):
        return swiglu(gate, up)
