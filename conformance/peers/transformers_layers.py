"""transformers' own MoE layers on trial; imported only where transformers is installed."""

from functools import cache
from typing import Any

import torch
from torch.func import functional_call
from transformers import MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from gaugeblock.conformance.engine.vocabulary import DTYPES, Tensors
from gaugeblock.conformance.peers.peer import peer
from gaugeblock.conformance.peers.transformers import without_parameters


class TransformersBlock:
    """A sparse block, which hands on what its router returned."""

    block_class: Any
    config_class: Any

    def __init__(self, implementation: str = "eager"):
        self.implementation = implementation

    def __call__(self, hidden_states, state, *, top_k, renormalize=True):
        block, routed = self.block(state, num_experts_per_tok=top_k, norm_topk_prob=renormalize)
        out = functional_call(block, dict(state), hidden_states[None])[0]
        logits, _, ids = routed.pop()
        return out, logits.float(), ids

    def block(self, state: Tensors, **options: Any) -> tuple[torch.nn.Module, list[Any]]:
        """The block of these sizes, and what its router returned last."""
        experts, width, inner = state["experts.down_proj"].shape
        shared = len(state.get("shared_expert.up_proj.weight", ()))
        sizes = dict(num_experts=experts, hidden_size=width, moe_intermediate_size=inner, shared_expert_intermediate_size=shared)
        alias = dict(num_local_experts=experts, intermediate_size=inner)  # as Mixtral's config has it
        return _block(self.block_class, self.config_class, self.implementation, **sizes, **alias, **options)


@cache
def _block(block_class: Any, config_class: Any, implementation: str, **options: Any) -> tuple[torch.nn.Module, list[Any]]:
    config = config_class(**options)
    config._experts_implementation = implementation
    block, routed = without_parameters(block_class, config), []
    block.gate.register_forward_hook(lambda module, inputs, results: routed.append(results))
    return block, routed


@peer("moe_layers.mixtral_moe", dtypes=DTYPES, rounding="eager", oracle=True, right_in=("float32",))
class TransformersMixtralBlock(TransformersBlock):
    """Mixtral's."""

    block_class, config_class = MixtralSparseMoeBlock, MixtralConfig


@peer("moe_layers.qwen3_moe", dtypes=DTYPES, rounding="eager", oracle=True, right_in=("float32",))
class TransformersQwen3Block(TransformersBlock):
    """Qwen3-MoE's."""

    block_class, config_class = Qwen3MoeSparseMoeBlock, Qwen3MoeConfig


@peer("moe_layers.qwen3_moe", dtypes=DTYPES, rounding="eager", oracle=True, right_in=("float32",))
class TransformersOlmoeBlock(TransformersBlock):
    """OLMoE's."""

    block_class, config_class = OlmoeSparseMoeBlock, OlmoeConfig


@peer("moe_layers.qwen2_moe", dtypes=DTYPES, rounding="eager", oracle=True, right_in=("float32",))
class TransformersQwen2Block(TransformersBlock):
    """Qwen2-MoE's."""

    block_class, config_class = Qwen2MoeSparseMoeBlock, Qwen2MoeConfig
