"""What dense models of transformers have between their products: rotary embeddings and gated activations, on trial; imported only
where transformers is installed."""

from typing import Any

import torch
from torch.func import functional_call
from transformers import Gemma2Config, Qwen3Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm, apply_rotary_pos_emb

from gaugeblock.conformance.engine.vocabulary import DTYPES
from gaugeblock.conformance.peers.modules import without_parameters
from gaugeblock.conformance.peers.peer import peer


def angles(cos: torch.Tensor, sin: torch.Tensor, heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As its models make them: of both halves, for a batch of one, in the dtype of the heads."""
    of_halves = [torch.cat([each, each], -1)[None].to(heads.dtype) for each in (cos, sin)]
    return of_halves[0], of_halves[1]


@peer("rotary.rotate", dtypes=DTYPES, right_in=("float32",), only="pairs == 'half-split'", rounding="eager", oracle=True)
class TransformersRotary:
    """Llama's and Qwen3's rotation; its angles are rounded to the dtype of the heads, which is as they say it is."""

    def __call__(self, heads, cos, sin, *, pairs):
        return apply_rotary_pos_emb(heads, heads, *angles(cos, sin, heads))[0]


@peer("rotary.qk_norm_rotary", dtypes=DTYPES, right_in=("float32",), only="pairs == 'half-split'", rounding="eager", oracle=True)
class TransformersQwen3QkNorm:
    """Qwen3's norms of queries and keys, and its rotation, whose angles are rounded to the dtype of the heads."""

    def __call__(self, query, key, query_weight, key_weight, cos, sin, *, eps, pairs):
        norm = without_parameters(Qwen3RMSNorm, query.shape[-1], eps)
        normed = [
            functional_call(norm, {"weight": weight}, heads) for heads, weight in ((query, query_weight), (key, key_weight))
        ]
        return apply_rotary_pos_emb(*normed, *angles(cos, sin, query))


class Chosen(torch.nn.Module):
    """In place of a projection: one of the two that a gated MLP is given, or what it is given."""

    def __init__(self, index: int | None = None) -> None:
        super().__init__()
        self.index = index

    def forward(self, given: Any) -> Any:
        return given if self.index is None else given[self.index]


def gated(mlp: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """A gated MLP without its three products."""
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = Chosen(0), Chosen(1), Chosen()
    return mlp((gate, up))


@peer("gated_activations.swiglu", dtypes=DTYPES, rounding="eager", oracle=True)
class TransformersQwen3Gate:
    """Qwen3's MLP without its products."""

    def __call__(self, gate, up):
        return gated(without_parameters(Qwen3MLP, Qwen3Config()), gate, up)


@peer("gated_activations.geglu", dtypes=DTYPES, only="approximation == 'tanh'", rounding="eager", oracle=True)
class TransformersGemma2Gate:
    """Gemma 2's MLP without its products."""

    def __call__(self, gate, up, *, approximation):
        return gated(without_parameters(Gemma2MLP, Gemma2Config()), gate, up)
