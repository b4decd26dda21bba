"""Liger's norms, gates and rotation on trial; imported only where liger-kernel is installed."""

import torch
from liger_kernel.ops.geglu import LigerGELUMulFunction
from liger_kernel.ops.group_norm import LigerGroupNormFunction
from liger_kernel.ops.layer_norm import LigerLayerNormFunction
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.rope import LigerRopeFunction
from liger_kernel.ops.swiglu import LigerSiLUMulFunction

from gaugeblock.conformance.engine.vocabulary import DTYPES
from gaugeblock.conformance.peers.peer import peer


@peer("norms.rms_norm", dtypes=DTYPES, kind="triton", rounding="eager")
class LigerRmsNorm:
    """As Llama has it, which is the default: rounded to the tokens' dtype before it is scaled."""

    def __call__(self, hidden_states, weight, *, eps):
        return LigerRMSNormFunction.apply(hidden_states, weight, eps)


@peer("norms.layer_norm_affine", dtypes=DTYPES, kind="triton", rounding="eager")
class LigerLayerNorm:
    """LigerLayerNorm's function."""

    def __call__(self, hidden_states, weight, bias, *, eps):
        return LigerLayerNormFunction.apply(hidden_states, weight, bias, eps)


@peer("norms.group_norm", dtypes=DTYPES, right_in=(), kind="triton", rounding="eager")
class LigerGroupNorm:
    """LigerGroupNorm's function."""

    def __call__(self, images, weight, bias, *, num_groups, eps):
        return LigerGroupNormFunction.apply(images, weight, bias, images.shape[1], num_groups, eps)


def turned(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """By Llama's rotation, told that its angles are those of pairs."""
    return LigerRopeFunction.apply(query, key, cos, sin, None, 1, query.shape[-1])


@peer("rotary.rotate", dtypes=DTYPES, right_in=(), kind="triton", only="pairs == 'half-split'", rounding="eager")
class LigerRotary:
    """Of queries; the key that it asks for is one of zeros."""

    def __call__(self, heads, cos, sin, *, pairs):
        return turned(heads, torch.zeros_like(heads[:, :1]), cos, sin)[0]


@peer("rotary.qk_norm_rotary", dtypes=DTYPES, right_in=(), kind="triton", only="pairs == 'half-split'", rounding="eager")
class LigerQkNorm:
    """Its norms and its rotation, as it puts them into Qwen3."""

    def __call__(self, query, key, query_weight, key_weight, cos, sin, *, eps, pairs):
        normed = [LigerRMSNormFunction.apply(*each, eps) for each in ((query, query_weight), (key, key_weight))]
        return turned(normed[0], normed[1], cos, sin)


@peer("gated_activations.geglu", dtypes=DTYPES, right_in=(), kind="triton", only="approximation == 'tanh'", rounding="eager")
class LigerGeGlu:
    """LigerGEGLUMLP's function."""

    def __call__(self, gate, up, *, approximation):
        return LigerGELUMulFunction.apply(gate, up)


@peer("gated_activations.swiglu", dtypes=DTYPES, right_in=(), kind="triton", rounding="eager")
class LigerSwiGlu:
    """LigerSwiGLUMLP's function."""

    def __call__(self, gate, up):
        return LigerSiLUMulFunction.apply(gate, up)
